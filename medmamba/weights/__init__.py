"""Published 2D weights in our networks: into their 2D form as they are, into their 3D form inflated.

Understood are the files of VMamba (the classifiers behind the encoders), VM-UNet, MSVM-UNet and MHS-VM. Nothing is
loaded in silence: :func:`load_published` answers with a :class:`Report` of every tensor on either side, and refuses a
load that would leave out what the published network computes. Needs torch, and safetensors for its files.
"""

from __future__ import annotations

from .errors import WeightsError
from .files import read_checkpoint
from .load import load_published
from .report import Report

__all__ = ["Report", "WeightsError", "load_published", "read_checkpoint"]
