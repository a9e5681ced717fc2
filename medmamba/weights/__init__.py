"""Weights from elsewhere in our networks: pretrained encoders, and published 2D weights.

Encoders that `medmamba pretrain` trains travel in files of their own: :func:`read_encoder`, :func:`load_encoder`.
Published 2D weights go into the 2D form of a network as they are, and into its 3D form inflated.

Understood are the files of VMamba (the classifiers behind the encoders), VM-UNet, MSVM-UNet and MHS-VM. Nothing is
loaded in silence: :func:`load_published` answers with a :class:`Report` of every tensor on either side, and refuses a
load that would leave out what the published network computes. Needs torch, and safetensors for its files.
"""

from __future__ import annotations

from .description import EncoderDescription
from .encoder import load_encoder, read_encoder, write_encoder
from .errors import WeightsError
from .files import read_checkpoint, read_training
from .load import load_published
from .nnssl import write_nnssl_checkpoint
from .report import Report

__all__ = [
    "EncoderDescription",
    "Report",
    "WeightsError",
    "load_encoder",
    "load_published",
    "read_checkpoint",
    "read_encoder",
    "read_training",
    "write_encoder",
    "write_nnssl_checkpoint",
]
