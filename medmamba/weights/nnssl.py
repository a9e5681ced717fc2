"""An encoder as a checkpoint with the block that the tools of nnssl read.

nnssl (Wald et al., "Revisiting MAE pre-training for 3D medical image segmentation", CVPR 2025, arXiv:2410.23132) puts
an ``nnssl_adaptation_plan`` into its checkpoints: how the network was built, how its images were made, and under which
keys encoder and stem lie. nnU-Net's commands for such checkpoints build their own architectures only; this file is for
people's own loaders, and for those commands once they build others.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from medmamba.files import write_atomically
from medmamba.networks import get_spec

from .description import EncoderDescription
from .encoder import described_encoder, read_encoder, stem_key

#: Name of the one configuration in the block.
CONFIGURATION = "medmamba"


def write_nnssl_checkpoint(path: str | os.PathLike[str], encoder_file: str | os.PathLike[str]) -> None:
    """Write ``network_weights``, ``nnssl_adaptation_plan``, ``citations`` and our description.

    Values are plain types and CPU tensors: ``torch.load(path, weights_only=True)`` reads the file.

    Args:
        path: of the ``.pth``; an existing file stays until the new one is complete.
        encoder_file: see :func:`medmamba.weights.read_encoder`.

    Raises:
        WeightsError: the encoder file cannot be read.
        OSError, RuntimeError: the folder is missing, full or not writable.
    """
    description, tensors = read_encoder(encoder_file)
    content = {
        "network_weights": {f"encoder.{name}": value for name, value in tensors.items()},
        "nnssl_adaptation_plan": adaptation_plan(description),
        "citations": [
            {
                "type": "Pre-training",
                "name": f"medmamba {description.network}",
                "apa_citations": list(description.citation),
            }
        ],
        "medmamba_encoder": description.to_json(),
    }
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def adaptation_plan(description: EncoderDescription) -> dict[str, Any]:
    """The fields of nnssl's ``AdaptationPlan`` as it serialises them."""
    stem = stem_key(described_encoder(description))
    stem = "encoder" if stem is None else f"encoder.{stem.removesuffix('.weight')}"
    return {
        "architecture_plans": {
            "arch_class_name": get_spec(description.network).build,
            "arch_kwargs": {**get_spec(description.network).defaults, **description.arguments},
            "arch_kwargs_requiring_import": [],
        },
        "pretrain_plan": _pretrain_plan(description),
        "pretrain_num_input_channels": description.input_channels,
        "recommended_downstream_patchsize": list(description.patch_size),
        "key_to_encoder": "encoder",
        "key_to_stem": stem,
        "keys_to_in_proj": [stem],
        "key_to_lpe": None,
    }


def _pretrain_plan(description: EncoderDescription) -> dict[str, Any]:
    resampling = "resample_data_or_seg_to_shape"
    axes = list(range(len(description.patch_size)))
    return {
        "dataset_name": f"corpus {description.corpus['hash']}",
        "plans_name": "medmamba",
        "original_median_spacing_after_transp": list(description.spacing_mm),
        "image_reader_writer": description.reader,
        "transpose_forward": axes,
        "transpose_backward": axes,
        "experiment_planner_used": "medmamba",
        "configurations": {
            CONFIGURATION: {
                "data_identifier": "medmamba",
                "preprocessor_name": "DefaultPreprocessor",
                "spacing_style": "fixed",
                "normalization_schemes": [description.normalisation["scheme"]] * description.input_channels,
                "use_mask_for_norm": [False] * description.input_channels,
                "resampling_fn_data": resampling,
                "resampling_fn_data_kwargs": {"is_seg": False, "order": 1, "order_z": 1, "force_separate_z": False},
                "resampling_fn_mask": resampling,
                "resampling_fn_mask_kwargs": {"is_seg": True, "order": 0, "order_z": 0, "force_separate_z": False},
                "spacing": list(description.spacing_mm),
                "patch_size": list(description.patch_size),
            }
        },
    }
