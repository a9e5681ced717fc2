"""Our prediction of a case against nnU-Net's, and the laws of its stream."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from medmamba.inference.model.labels import read_labels
from medmamba.inference.predictor import strips
from medmamba.inference.predictor.case import Window, predict_case
from medmamba.inference.predictor.labels import decide
from medmamba.inference.predictor.resample import axis_maps, resample_slabs
from medmamba.inference.predictor.window import (
    count_tiles,
    mean_of,
    predict_slabs,
    tile_starts,
    tile_weights,
    with_mirroring,
)
from medmamba.inference.presets import PRESETS, Preset
from medmamba.stop import Stopped

SIZES = st.tuples(*[st.integers(1, 9)] * 3)


class Smooth(nn.Module):
    """A network without training whose logits are far apart: a blur of the image against a threshold per class."""

    def __init__(self, classes: int, ndim: int, channels: int = 1) -> None:
        super().__init__()
        build = {2: nn.Conv2d, 3: nn.Conv3d}[ndim]
        self.conv = build(channels, classes, 5, padding=2)
        with torch.no_grad():
            self.conv.weight.fill_(1 / 5**ndim)
            for k in range(classes):
                self.conv.weight[k] *= 10 * k
                self.conv.bias[k] = -1.5 * k * (k - 1)

    def forward(self, x):
        return self.conv(x)


def plans_of(patch=(8, 8, 8), spacing=(1.0, 1.0, 1.0), transpose=(0, 1, 2), schemes=("ZScoreNormalization",)) -> dict:
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    back = [list(transpose).index(axis) for axis in range(3)]
    return {
        "dataset_name": "Dataset999_Test",
        "plans_name": "nnUNetPlans",
        "transpose_forward": list(transpose),
        "transpose_backward": back,
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            "0": {"mean": 0.0, "std": 1.0, "percentile_00_5": -3.0, "percentile_99_5": 3.0}
        },
        "configurations": {
            "3d_fullres": {
                "data_identifier": "x",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": list(patch),
                "spacing": list(spacing),
                "normalization_schemes": list(schemes),
                "use_mask_for_norm": [False] * len(schemes),
                "resampling_fn_data": "resample_data_or_seg_to_shape",
                "resampling_fn_seg": "resample_data_or_seg_to_shape",
                "resampling_fn_data_kwargs": {**resampling, "order": 3},
                "resampling_fn_seg_kwargs": {**resampling, "is_seg": True},
                "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
                "resampling_fn_probabilities_kwargs": resampling,
                "architecture": {"network_class_name": "none", "arch_kwargs": {}, "_kw_requires_import": []},
            }
        },
    }


def dataset_of(classes: int, channels: int = 1) -> dict:
    labels = {"background": 0, **{f"organ {k}": k for k in range(1, classes)}}
    return {"channel_names": {str(c): "MR" for c in range(channels)}, "labels": labels, "file_ending": ".nii.gz"}


def by_nnunet(values, spacing, network, plans, dataset_json, mirror=None, step=0.5):
    predictor = nnUNetPredictor(
        tile_step_size=step, use_mirroring=mirror is not None, device=torch.device("cpu"), allow_tqdm=False
    )
    manager = PlansManager(deepcopy(plans))
    settings_ = manager.get_configuration("3d_fullres")
    parameters = [network.state_dict()]
    predictor.manual_initialization(network, manager, settings_, parameters, dataset_json, "nnUNetTrainer", mirror)
    return predictor.predict_single_npy_array(values.astype(np.float32), {"spacing": list(spacing)})


def blobs(shape, seed=0, channels=1):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, channels, *[max(2, size // 4) for size in shape], generator=generator)
    return torch.nn.functional.interpolate(coarse, shape, mode="trilinear")[0].numpy()


@pytest.mark.parametrize(
    ("shape", "spacing", "planned", "patch", "transpose"),
    [
        ((20, 17, 23), (1, 1, 1), (1, 1, 1), (8, 8, 8), (0, 1, 2)),
        ((5, 7, 9), (1, 1, 1), (1, 1, 1), (8, 12, 8), (0, 1, 2)),
        ((12, 20, 16), (2.0, 1.2, 0.9), (1.5, 1, 1), (8, 12, 8), (0, 1, 2)),
        ((6, 30, 28), (5, 1, 1), (5, 1.3, 1.3), (4, 16, 16), (0, 1, 2)),
        ((30, 6, 28), (1, 5, 1), (6, 1.3, 1.3), (4, 16, 16), (1, 0, 2)),
        ((16, 18, 14), (1, 1, 4), (2, 2, 2), (4, 8, 8), (0, 1, 2)),
        ((9, 24, 26), (3, 1, 1), (1.4, 1.4), (16, 16), (0, 1, 2)),
    ],
    ids=["plain", "smaller than the tile", "resampled", "coarse axis", "exchanged axes", "coarse last axis", "2d"],
)
@pytest.mark.parametrize("mirror", [None, (0, 1)], ids=["one view", "mirrored"])
def test_labels_are_those_of_nnunet(shape, spacing, planned, patch, transpose, mirror):
    plans = plans_of(patch, planned, transpose)
    dataset_json, values = dataset_of(3), blobs(shape)
    network = Smooth(3, len(patch)).eval()
    forward = with_mirroring(network, mirror) if mirror else network
    ours = predict_case(values, spacing, forward, plans, "3d_fullres", read_labels(dataset_json))
    theirs = by_nnunet(values, spacing, network, plans, dataset_json, mirror)
    assert ours.shape == theirs.shape == shape
    assert ours.dtype == np.uint8
    assert len(np.unique(theirs)) == 3
    # nnU-Net adds up in float16: where two classes are nearly equal it may decide otherwise.
    assert (ours != theirs).mean() < 2e-3


def test_regions_are_those_of_nnunet():
    dataset_json = dataset_of(4)
    dataset_json["labels"] = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}
    dataset_json["regions_class_order"] = [1, 2, 3]
    values, plans, network = blobs((14, 15, 16)), plans_of(), Smooth(3, 3).eval()
    with torch.no_grad():
        network.conv.weight.fill_(10 / 125)
        network.conv.bias.copy_(torch.tensor([2.0, -1.0, -4.0]))
    ours = predict_case(values, (1, 1, 1), network, plans, "3d_fullres", read_labels(dataset_json))
    theirs = by_nnunet(values, (1, 1, 1), network, plans, dataset_json)
    assert len(np.unique(theirs)) == 4
    assert (ours != theirs).mean() < 2e-3


@given(size=st.integers(1, 300), tile=st.integers(1, 64), step=st.sampled_from([0.25, 0.5, 0.7, 1.0]))
def test_tiles_start_where_nnunet_starts_them(size, tile, step):
    size = max(size, tile)
    assert tile_starts(size, tile, step) == compute_steps_for_sliding_window((size,), (tile,), step)[0]


@pytest.mark.parametrize("tile", [(8, 8, 8), (4, 17, 32), (40, 56)], ids=str)
def test_weights_of_a_tile_are_those_of_nnunet(tile):
    theirs = compute_gaussian(tile, sigma_scale=1 / 8, value_scaling_factor=10, device=torch.device("cpu"))
    assert torch.equal(tile_weights(tile), theirs.float())


@settings(deadline=None, max_examples=60)
@given(
    shape=SIZES,
    target=SIZES,
    spacing=st.tuples(*[st.sampled_from([1.0, 1.0, 2.0, 3.5])] * 3),
    target_spacing=st.tuples(*[st.sampled_from([1.0, 1.0, 4.0])] * 3),
    cut=st.integers(1, 4),
)
def test_planes_are_resampled_as_nnunet_resamples_the_volume(shape, target, spacing, target_spacing, cut):
    logits = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    theirs = resample_data_or_seg_to_shape(
        logits.double(), target, spacing, target_spacing, order=1, order_z=0, force_separate_z=None
    )
    maps = axis_maps(shape, target, spacing, target_spacing)
    ours = torch.full((2, *target), torch.nan)
    for plane, rows, block in resample_slabs(logits.split(cut, 1), maps):
        ours[:, plane, rows] = block
    torch.testing.assert_close(ours.double(), torch.as_tensor(theirs), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(
    size=st.tuples(*[st.integers(4, 14)] * 3),
    tile=st.tuples(*[st.integers(1, 4)] * 3),
    step=st.sampled_from([0.5, 0.75, 1.0]),
)
def test_a_network_that_looks_at_one_voxel_is_not_changed_by_tiles(size, tile, step):
    image = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    slabs = predict_slabs(image, lambda x: torch.cat([x, -x], 1), tile=tile, step=step, classes=4)
    whole = torch.cat([slab.clone() for slab in slabs], 1)
    torch.testing.assert_close(whole, torch.cat([image, -image]), rtol=1e-4, atol=1e-5)


def test_the_sums_of_a_deep_volume_are_not_larger_than_those_of_a_tile():
    """What is kept does not grow with the volume: the slabs of 200 planes share the memory of one tile's depth."""
    image = torch.zeros(1, 200, 8, 8)
    sizes = [
        slab.untyped_storage().nbytes()
        for slab in predict_slabs(image, lambda x: x.expand(-1, 3, -1, -1, -1), tile=(8, 8, 8), step=0.5, classes=3)
    ]
    assert max(sizes) <= 3 * 8 * 8 * 8 * 4


def test_several_networks_are_averaged():
    forwards = [lambda x: x, lambda x: 3 * x]
    x = torch.randn(1, 1, 2, 2, 2)
    torch.testing.assert_close(mean_of(forwards)(x), 2 * x)


def test_mirroring_averages_over_all_reflections():
    weights = torch.rand(1, 1, 3, 4, 5)
    mirrored = with_mirroring(lambda x: x * weights, (0, 2))
    x = torch.randn(1, 1, 3, 4, 5)
    symmetric = sum(weights.flip(axes) for axes in ([], [2], [4], [2, 4])) / 4
    torch.testing.assert_close(mirrored(x), x * symmetric)


def test_a_request_to_stop_is_heard_between_two_tiles():
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 3

    with pytest.raises(Stopped):
        predict_case(
            blobs((20, 20, 20)), (1, 1, 1), Smooth(2, 3), plans_of(), "3d_fullres", read_labels(dataset_of(2)),
            Window(should_stop=should_stop),
        )  # fmt: skip
    assert asked == 4


@pytest.mark.parametrize(
    ("patch", "shape", "planned"),
    [((8, 8, 8), (20, 40, 18), (1.2, 0.9, 1)), ((16, 16), (4, 50, 20), (1, 1)), ((8, 8, 8), (5, 40, 6), (1, 1, 1))],
    ids=["3d", "2d", "thinner than the tile"],
)
def test_a_bound_on_memory_changes_no_label(monkeypatch, patch, shape, planned):
    monkeypatch.setattr(strips, "resident_bytes", lambda: 0)
    plans, labels, network = plans_of(patch, planned), read_labels(dataset_of(3)), Smooth(3, len(patch))
    slab_row = 4 * 3 * (patch[0] if len(patch) == 3 else 1) * max(shape[2], patch[-1])
    free, bound = Window(), Window(max_ram_bytes=2 * 20 * slab_row)
    case = (blobs(shape), (1, 1, 1), network, plans, "3d_fullres", labels)
    assert np.array_equal(predict_case(*case, free), predict_case(*case, bound))
    assert free.facts["strips"] == 1 < bound.facts["strips"]
    assert bound.facts["tiles_computed"] > free.facts["tiles_computed"] == free.facts["tiles"]


@pytest.mark.parametrize("shape", [(24, 40, 48), (5, 40, 48)], ids=["deep", "thinner than the tile"])
def test_air_around_a_body_is_left_out_and_the_labels_stay(shape):
    plans = plans_of(schemes=("CTNormalization",))
    values = np.random.default_rng(0).normal(-10, 1, (1, *shape)).astype(np.float32)
    values[:, :, 4:20, 4:20] = blobs((shape[0], 16, 16))
    labels, network = read_labels(dataset_of(3)), Smooth(3, 3)
    free, skipping = Window(), Window(skips_air=True)
    case = (values, (1, 1, 1), network, plans, "3d_fullres", labels)
    whole = predict_case(*case, free)
    assert np.array_equal(whole, predict_case(*case, skipping))
    assert len(np.unique(whole)) == 3
    assert free.facts["tiles_computed"] == skipping.facts["tiles"] > 2 * skipping.facts["tiles_computed"]


def test_presets_take_less_and_less_and_the_first_is_nnunets():
    image, passes = torch.zeros(1, 40, 40, 40), []
    for preset in PRESETS.values():
        views = 8 if preset.mirrors else 1
        passes.append(views * count_tiles(image.shape[1:], (16, 16, 16), preset.step))
    assert passes == sorted(passes, reverse=True)
    assert len(set(passes)) == len(passes)
    assert PRESETS["accurate"] == Preset(step=0.5, mirrors=True, skips_air=False)


def test_of_equal_logits_the_first_wins():
    labels = read_labels(dataset_of(4))
    logits = torch.randint(0, 3, (4, 50, 60), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(decide(logits, labels).long(), torch.from_numpy(logits.numpy().argmax(0)))


def test_another_resampling_of_logits_is_refused():
    plans = plans_of()
    plans["configurations"]["3d_fullres"]["resampling_fn_probabilities_kwargs"] = {"order": 3}
    with pytest.raises(ValueError, match="predict with nnUNetv2_predict"):
        predict_case(blobs((9, 9, 9)), (1, 1, 1), Smooth(2, 3), plans, "3d_fullres", read_labels(dataset_of(2)))


def test_hundreds_of_labels_do_not_fit_into_a_byte():
    labels = read_labels({"labels": {"background": 0, **{f"label {k}": k for k in range(1, 300)}}})
    logits = torch.zeros(300, 1, 1, 2)
    logits[299, ..., 1] = 1
    assert decide(logits, labels).flatten().tolist() == [0, 299]


def test_a_stock_training_is_predicted_with_its_own_files():
    """The plans of a public dataset, as nnU-Net wrote them, on one of its images."""
    ready = Path(__file__).resolve().parents[2] / "plans" / "ready" / "Dataset004_Hippocampus"
    plans = json.loads((ready / "nnUNetMedMambaVMUNetMPlans.json").read_text())
    plans["configurations"]["3d_fullres"]["patch_size"] = [16, 24, 16]
    values, dataset_json, network = blobs((30, 40, 28)), dataset_of(3), Smooth(3, 3).eval()
    ours = predict_case(values, (1, 1, 1), network, plans, "3d_fullres", read_labels(dataset_json))
    theirs = by_nnunet(values, (1, 1, 1), network, plans, dataset_json)
    assert (ours != theirs).mean() < 2e-3
