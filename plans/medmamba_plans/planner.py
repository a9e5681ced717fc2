"""Patch and batch that fit a GPU: nnU-Net's own planner, with the memory of our network in place of its estimate.

nnU-Net's planner starts with a large patch and makes it smaller until the network fits with a batch of 2 (12 slices in
2D). Only what "fits" means is ours; spacing, normalisation, topology and the order of patches are nnU-Net's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from medmamba_plans.derive import BUDGET, PlanError, Request
from medmamba_plans.stock import nnunet_at_work

if TYPE_CHECKING:
    from medmamba.diagnostics import Footprint

MIN_BATCH = 2
#: In 2D the whole dataset would often fit into one batch. nnU-Net's reference is 12 slices.
MOST_SLICES = 64

#: What of nnU-Net's architecture goes into ours.
_TOPOLOGY = ("strides", "kernel_sizes", "features_per_stage")
#: A patch is not counted where another patch of the same network says that it is this much too large: memory is
#: proportional to the voxels within a few percent.
_CLEARLY = 1.2

#: What preprocessed data depend on, of a configuration and of the whole plans.
_DATA_KEYS = (
    "preprocessor_name",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_seg",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg_kwargs",
)
_DATASET_KEYS = ("transpose_forward", "image_reader_writer", "foreground_intensity_properties_per_channel")


def plan_for_budget(dataset: str, request: Request, stock: Mapping[str, Any]) -> dict[str, Any]:
    """Plans of nnU-Net, with an architecture of its own, whose patch and batch fit a budget with our network.

    Nothing is written but a copy of ``dataset.json`` beside the plans, as nnU-Net's planners do.

    Args:
        dataset: its name; nnUNet_raw, nnUNet_preprocessed and the fingerprint must be there.
        request: what to plan; its budget must be set.
        stock: the dataset's stock plans, whose preprocessed data are used wherever they are the same.

    Returns:
        a plans dictionary for :func:`medmamba_plans.derive.derive_plans`.

    Raises:
        PlanError: no patch fits the budget, or the network refuses the strides.
        CommandError: nnU-Net cannot plan the dataset; its reason is in the text.
    """
    from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset

    with nnunet_at_work(dataset):
        plans, _ = plan_experiment_dataset(
            dataset,
            planner_class(request),
            gpu_memory_target_in_gb=request.budget_gb,
            overwrite_plans_name=request.plans_name,
        )
    plans = json.loads(json.dumps(plans))  # lists for tuples, as nnU-Net reads them back from its file
    share_data(plans, stock)
    return {**plans, "plans_name": BUDGET}


def planner_class(request: Request) -> Any:
    """A planner for nnU-Net's ``plan_experiment_dataset``; a function because nnU-Net is imported here."""
    import numpy as np
    import torch
    from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
        ResEncUNetPlanner,
    )
    from nnunetv2.utilities.json_export import recursive_fix_for_json_export

    from medmamba.diagnostics import GB, MemoryModel, footprint
    from medmamba.nnunet.architecture import ArchitectureError, architecture_block, build_network

    model = MemoryModel.load("cuda")

    class MedMambaPlanner(ResEncUNetPlanner):
        """Estimates are in units of the budget: 1.0 is a reference batch that fills it."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.UNet_reference_val_3d = self.UNet_reference_val_2d = 1.0
            self.UNet_reference_val_corresp_GB = self.UNet_vram_target_GB
            self.max_dataset_covered = 1  # as nnU-Net's M, L and XL
            self.budget = self.UNet_vram_target_GB * GB
            self.cascade_channels = 0
            self.extra_channels = 0
            self.counted: dict[tuple[str, tuple[int, ...]], Footprint] = {}
            self.counted_with: dict[str, tuple[int, Footprint]] = {}

        def plan_experiment(self) -> dict[str, Any]:
            plans: dict[str, Any] = super().plan_experiment()
            if "3d_cascade_fullres" in plans["configurations"] and not self.cascade_channels:
                # The second stage of a cascade sees the first one's segmentation as further channels.
                self.cascade_channels = len(set(self.dataset_json["labels"]) - {"background", "ignore"})
                plans = super().plan_experiment()
            return plans

        def save_plans(self, plans: dict[str, Any]) -> None:
            """Nothing is saved yet: the plans do not name our network."""
            recursive_fix_for_json_export(plans)

        def get_plans_for_configuration(
            self,
            spacing: Any,
            median_shape: Any,
            data_identifier: str,
            approximate_n_voxels_dataset: float,
            _cache: Any,
        ) -> dict[str, Any]:
            self.extra_channels = self.cascade_channels if data_identifier.endswith("3d_fullres") else 0
            # A cache of its own: nnU-Net's does not tell a cascade's channels apart.
            plan: dict[str, Any] = super().get_plans_for_configuration(
                spacing, median_shape, data_identifier, approximate_n_voxels_dataset, {}
            )
            block = plan["architecture"]
            counted = self.footprint(plan["patch_size"], block["network_class_name"], block["arch_kwargs"])
            fitting = model.largest_batch(counted, self.budget)
            covered = round(approximate_n_voxels_dataset / math.prod(map(int, plan["patch_size"])))
            most = MOST_SLICES if len(plan["patch_size"]) == 2 else fitting
            plan["batch_size"] = max(MIN_BATCH, min(fitting, covered, most))
            return plan

        def static_estimate_VRAM_usage(
            self,
            patch_size: Sequence[int],
            input_channels: int,
            output_channels: int,
            arch_class_name: str,
            arch_kwargs: Mapping[str, Any],
            arch_kwargs_req_import: Sequence[str],
        ) -> float:
            """Memory of the reference batch over what the budget has for it."""
            is_2d = len(patch_size) == 2
            batch = self.UNet_reference_val_corresp_bs_2d if is_2d else self.UNet_reference_val_corresp_bs_3d
            like = self.like(patch_size, arch_kwargs)
            if like is not None and self.share(like, batch) > _CLEARLY:
                return self.share(like, batch)
            counted = self.footprint(patch_size, arch_class_name, arch_kwargs)
            estimate = self.share(counted, batch)
            if estimate > 1 and max(patch_size) < 4 * self.UNet_featuremap_min_edge_length:
                size = "x".join(map(str, patch_size))
                raise PlanError(
                    f"no patch fits {self.UNet_vram_target_GB:g} GB: with a patch of {size} and a batch of "
                    f"{batch} the training needs {model.peak(counted, batch) / GB:.1f} GB; give a larger budget, or a "
                    "smaller network with --variant"
                )
            return estimate

        def share(self, counted: Footprint, batch: int) -> float:
            free = self.budget - model.without_batch(counted)
            return batch * model.per_sample(counted) / free if free > 0 else math.inf

        def like(self, patch_size: Sequence[int], arch_kwargs: Mapping[str, Any]) -> Footprint | None:
            """Footprint of this patch by its voxels, if the network has been counted with another one."""
            known = self.counted_with.get(self.topology(arch_kwargs))
            if known is None:
                return None
            voxels, counted = known
            return replace(counted, peak=round(counted.peak * math.prod(map(int, patch_size)) / voxels))

        def topology(self, arch_kwargs: Mapping[str, Any]) -> str:
            return json.dumps([self.channels(), *(np.array(arch_kwargs[key]).tolist() for key in _TOPOLOGY)])

        def channels(self) -> int:
            return len(self.dataset_json.get("channel_names") or self.dataset_json["modality"]) + self.extra_channels

        def footprint(
            self, patch_size: Sequence[int], arch_class_name: str, arch_kwargs: Mapping[str, Any]
        ) -> Footprint:
            topology, patch = self.topology(arch_kwargs), [int(n) for n in patch_size]
            if (topology, tuple(patch)) not in self.counted:
                planned = {key: np.array(arch_kwargs[key]).tolist() for key in _TOPOLOGY}
                stock = {"network_class_name": arch_class_name, "arch_kwargs": planned}
                try:
                    block = architecture_block(request.network, stock, request.network_options)
                    with torch.device("meta"):
                        network = build_network(block, self.channels(), len(self.dataset_json["labels"]))
                    counted = footprint(network, self.channels(), patch)
                except ArchitectureError as error:
                    raise PlanError(str(error)) from error
                except (ValueError, TypeError, KeyError) as error:
                    raise PlanError(str(error.args[0])) from error
                self.counted[topology, tuple(patch)] = counted
                self.counted_with[topology] = (math.prod(patch), counted)
            return self.counted[topology, tuple(patch)]

    return MedMambaPlanner


def share_data(plans: dict[str, Any], stock: Mapping[str, Any]) -> None:
    """Name the stock plans' preprocessed data in every configuration that needs the same, others by their own name."""
    same_dataset = all(plans[key] == stock.get(key) for key in _DATASET_KEYS)
    for name, configuration in plans["configurations"].items():
        if "data_identifier" not in configuration:
            continue
        theirs = stock["configurations"].get(name)
        if same_dataset and theirs is not None and _same_data(configuration, theirs):
            configuration["data_identifier"] = theirs["data_identifier"]
        else:
            configuration["data_identifier"] = f"{plans['plans_name']}_{name}"


def _same_data(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    close = all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(ours["spacing"], theirs["spacing"], strict=True))
    return close and all(ours[key] == theirs.get(key) for key in _DATA_KEYS)


def predicted_peak(plans: Mapping[str, Any], name: str, dataset_json: Mapping[str, Any]) -> float:
    """Peak bytes of training a configuration on a GPU, as the memory model predicts them.

    Args:
        plans: with an architecture block, ours or nnU-Net's.
        name: of the configuration.
        dataset_json: of the dataset: its channels and labels.
    """
    import torch

    from medmamba.diagnostics import MemoryModel, footprint
    from medmamba.nnunet.architecture import build_network, network_ends
    from medmamba.nnunet.folders import configuration_of

    configuration = configuration_of(plans, name)
    channels, classes = network_ends(plans, configuration, dataset_json)
    with torch.device("meta"):
        network = build_network(configuration["architecture"], channels, classes)
    counted = footprint(network, channels, configuration["patch_size"])
    return MemoryModel.load("cuda").peak(counted, configuration["batch_size"])
