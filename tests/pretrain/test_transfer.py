"""The parts of the transfer experiment that carry its result (``pretrain/results/transfer.py``)."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType

import nibabel
import numpy as np
import pytest
import torch
from scipy import stats

from medmamba.cli import main
from medmamba.networks import create_network

CHECKOUT = Path(__file__).resolve().parents[2]
ARGUMENTS = {
    "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
    "features_per_stage": [4, 6, 8],
    "depths": 1,
    "expansion": 2,
    "first_scan_stage": 2,
    "mamba_depths": 1,
    "d_state": 4,
}
SHAPE = (8, 12, 8)


def _load(name: str) -> ModuleType:
    """A script of the results, which are no package."""
    spec = importlib.util.spec_from_file_location(name, CHECKOUT / "pretrain" / "results" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


probe, inpainting, transfer = map(_load, ("probe", "inpainting", "transfer"))


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return create_network("mednextmamba", 1, 2, **ARGUMENTS).encoder


@pytest.fixture
def crops():
    generator = np.random.default_rng(0)
    images = generator.normal(size=(4, 1, *SHAPE)).astype(np.float32)
    return images, (images[:, 0] > 0.5).astype(np.int64)


# Splits


CASES = [f"patient_{number:03}" for number in range(100)]


def test_no_case_is_both_tested_and_trained_on_nor_in_two_seeds():
    test, labelled = transfer.split_cases(CASES)
    groups = [set(test), *map(set, labelled.values())]
    assert [len(group) for group in groups] == [30, 20, 20, 20]
    assert not any(a & b for a, b in itertools.combinations(groups, 2))


def test_the_split_does_not_depend_on_the_order_of_the_files():
    assert transfer.split_cases(CASES) == transfer.split_cases(reversed(CASES))


def test_the_small_training_set_lies_within_the_large_one_and_all_are_tested_on_the_same_cases():
    splits = transfer.splits_final(*transfer.split_cases(CASES))
    few, many = transfer.LABELS
    for seed in transfer.SEEDS:
        small, large = (splits[transfer.fold_of(labels, seed)] for labels in (few, many))
        assert len(small["train"]) == few
        assert len(large["train"]) == many
        assert set(small["train"]) < set(large["train"])
    assert len({tuple(split["val"]) for split in splits}) == 1


def test_a_fold_says_which_labels_and_seed_it_has():
    found = [transfer.labels_and_seed(fold) for fold in range(len(transfer.LABELS) * len(transfer.SEEDS))]
    assert found == list(itertools.product(transfer.LABELS, transfer.SEEDS))
    assert [transfer.fold_of(*pair) for pair in found] == list(range(len(found)))


def test_too_few_cases_are_refused():
    with pytest.raises(ValueError, match="89 cases are too few"):
        transfer.split_cases(CASES[:89])


# What is compared


def test_shuffling_keeps_the_values_of_every_tensor_and_changes_what_the_encoder_computes(encoder):
    image = torch.randn(1, 1, *SHAPE)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    features = encoder(image)
    moved = transfer.shuffled(before, seed=0)
    assert moved.keys() == before.keys()
    for name, value in moved.items():
        assert value.shape == before[name].shape
        assert torch.equal(value.flatten().sort().values, before[name].flatten().sort().values)
    encoder.load_state_dict(moved)
    assert not any(torch.allclose(a, b) for a, b in zip(features, encoder(image), strict=True))


def test_every_seed_shuffles_in_its_own_way_and_always_in_the_same(encoder):
    tensors = {"weight": torch.arange(100.0).view(4, 25)}
    once, again, other = (transfer.shuffled(tensors, seed)["weight"] for seed in (0, 0, 1))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


def test_labelled_cases_that_were_not_excluded_stop_the_experiment(tmp_path, write_ct):
    images = tmp_path / "images"
    for seed in range(3):
        write_ct(images / f"case_{seed}_0000.nii.gz", seed)
    work = transfer.Work(tmp_path)
    options = ["--spacing", "1.5", "--jobs", "1"]
    (tmp_path / "exclude.txt").write_text(f"{images}\n")
    exclude = ["--list-exclude", str(tmp_path / "exclude.txt")]
    other = tmp_path / "others"
    write_ct(other / "case_7_0000.nii.gz", 7)
    main(["pretrain", "ingest", str(images), "--out", str(work.heldout), *options])
    main(["pretrain", "ingest", str(other), "--out", str(work.corpus), *options])
    with pytest.raises(SystemExit, match="0 of 3 labelled cases excluded"):
        transfer.check_apart(work, 3)
    main(["pretrain", "ingest", str(other), "--out", str(work.corpus), *options, *exclude])
    transfer.check_apart(work, 3)


# Probe


def test_a_probe_leaves_every_bit_of_the_encoder_and_changes_its_own_layers(encoder, crops):
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    model = probe.LinearProbe(encoder, 2, torch.from_numpy(crops[0][:1])).train()
    probe.fit(model, *crops, probe.Fit(steps=5), seed=0)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert not any(module.training for module in encoder.modules())
    assert all(bool(head.weight.abs().sum() > 0) for head in model.heads)


def test_upsampled_logits_are_those_of_one_layer_on_upsampled_features(encoder, crops):
    image = torch.from_numpy(crops[0])
    model = probe.LinearProbe(encoder, 3, image[:1])
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.normal_()
        features = [
            torch.nn.functional.interpolate(scaling(feature), size=SHAPE, mode="trilinear")
            for scaling, feature in zip(model.scalings, model.features(image), strict=True)
        ]
        weight = torch.cat([head.weight for head in model.heads], 1)
        expected = torch.nn.functional.conv3d(torch.cat(features, 1), weight, model.heads[0].bias)
        torch.testing.assert_close(model(image), expected, rtol=1e-4, atol=1e-4)


def test_features_are_standardised_over_the_crops_and_constant_channels_are_only_centred():
    features = torch.randn(5, 3, *SHAPE) * torch.tensor([2.0, 0.1, 0.0]).view(-1, 1, 1, 1) + 4
    scaling = probe.Standardise(3)
    scaling.measure([features[:2], features[2:]])
    found = scaling(features).movedim(1, 0).flatten(1)
    torch.testing.assert_close(found.mean(1), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.std(1), torch.tensor([1.0, 1.0, 0.0]), atol=1e-3, rtol=0)


class _Pyramid(torch.nn.Module):
    """Features without weights: the image, and its mean over boxes of two."""

    def forward(self, x):
        return [x, torch.nn.functional.avg_pool3d(x, 2)]


def test_what_a_feature_separates_is_found(crops):
    images, labels = crops
    model = probe.LinearProbe(_Pyramid(), 2, torch.from_numpy(images[:1]))
    probe.fit(model, images, labels, probe.Fit(steps=200, lr=0.1), seed=0)
    found = model(torch.from_numpy(images)).argmax(1).numpy()
    assert (found == labels).mean() > 0.98


def test_crops_are_parts_of_their_cases_with_zeros_beyond_and_half_of_them_hold_a_structure():
    generator = np.random.default_rng(0)
    images = [generator.uniform(1, 2, (1, *shape)).astype(np.float32) for shape in ((9, 12, 5), (30, 7, 14))]
    labels = [np.full(image.shape[1:], -1) for image in images]
    for label in labels:
        label[0, 0, 0] = 2
    size, count = (8, 8, 8), 12
    found, truth = probe.draw_crops(images, labels, size, count, seed=0)
    assert found.shape == (count, 1, *size)
    for number in range(count):
        inside = found[number, 0] > 0
        values = set(found[number, 0][inside].tolist())
        assert values <= set(images[number % 2].ravel().tolist())
        assert not truth[number][~inside].any()
        holds = (number // 2) % 2 == 1
        assert not holds or (truth[number] == 2).any()


# Reconstruction


@pytest.fixture
def half_seen():
    generator = np.random.default_rng(0)
    image = generator.normal(size=(6, 7, 8))
    return image, generator.random(image.shape) < 0.4


@pytest.mark.parametrize("name", ["nearest", "harmonic"])
def test_inpainting_keeps_what_is_visible_and_reads_nothing_else(half_seen, name):
    image, visible = half_seen
    inpaint = getattr(inpainting, name)
    found = inpaint(image, visible)
    assert np.array_equal(found[visible], image[visible])
    assert np.array_equal(found, inpaint(np.where(visible, image, 99.0), visible))


def test_harmonic_inpainting_is_the_mean_of_the_neighbours(half_seen):
    image, visible = half_seen
    found = inpainting.harmonic(image, visible)
    around = np.zeros_like(found)
    count = np.zeros_like(found)
    for axis in range(3):
        for step in (1, -1):
            neighbour = np.roll(found, step, axis)
            exists = np.ones(found.shape, bool)
            np.moveaxis(exists, axis, 0)[0 if step == 1 else -1] = False
            around += np.where(exists, neighbour, 0)
            count += exists
    np.testing.assert_allclose(found[~visible], (around / count)[~visible], atol=5e-3)


def test_along_a_line_harmonic_inpainting_is_linear_interpolation():
    visible = np.isin(np.arange(20), (3, 8, 15)).reshape(1, 1, -1)
    image = np.random.default_rng(0).normal(size=(1, 1, 20))
    expected = np.interp(np.arange(20), np.flatnonzero(visible), image[visible])
    np.testing.assert_allclose(inpainting.harmonic(image, visible)[0, 0], expected, atol=2e-3)


def test_nearest_inpainting_takes_a_visible_voxel_at_the_smallest_distance(half_seen):
    image, visible = half_seen
    found, places = inpainting.nearest(image, visible), np.argwhere(visible)
    for voxel in np.argwhere(~visible):
        distance = np.square(places - voxel).sum(1)
        assert found[tuple(voxel)] in image[visible][distance == distance.min()]


# Collection


@pytest.fixture
def finished(tmp_path):
    """A work folder with one training whose Dice nnU-Net itself has computed, and the segmentations."""
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
    from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient

    plans = json.loads((CHECKOUT / "tests" / "data" / "plans" / "isotropic.json").read_text())
    labels = {"background": 0, "Stem": 1, "Cord": 2, "Nowhere": 3}
    dataset = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz", "numTraining": 3}
    work = transfer.Work(tmp_path)
    (tmp_path / "raw" / "Dataset901_Isotropic").mkdir(parents=True)
    summary = work.summary("toki", 20, 1)
    model = summary.parents[2]
    truths = tmp_path / "truths"
    for folder in (summary.parent, truths):
        folder.mkdir(parents=True)
    (model / "plans.json").write_text(json.dumps(plans))
    (model / "dataset.json").write_text(json.dumps(dataset))
    generator, maps = np.random.default_rng(0), {}
    for number in range(3):
        truth, found = generator.integers(0, 3, (2, 6, 7, 8)).astype(np.uint8)
        maps[f"case_{number}"] = (found, truth)
        for folder, values in ((summary.parent, found), (truths, truth)):
            nibabel.save(nibabel.Nifti1Image(values, np.diag([-2, 2, 2, 1])), folder / f"case_{number}.nii.gz")
    compute_metrics_on_folder(
        str(truths), str(summary.parent), str(summary), NibabelIOWithReorient(), ".nii.gz", [1, 2, 3], num_processes=1
    )
    return work, maps


@pytest.mark.slow
def test_the_dice_of_the_table_is_that_of_the_segmentations(finished):
    work, maps = finished
    (found,) = transfer.finetuned_scores(work)
    assert (found.protocol, found.arm, found.labels, found.seed) == ("finetune", "toki", 20, 1)
    for case, (prediction, truth) in maps.items():
        expected = [2 * ((prediction == k) & (truth == k)).sum() / ((prediction == k).sum() + (truth == k).sum())
                    for k in (1, 2)]  # fmt: skip
        assert [found.dice[case]["Stem"], found.dice[case]["Cord"]] == pytest.approx(expected)
        assert np.isnan(found.dice[case]["Nowhere"])
        assert found.of("mean")[case] == pytest.approx(np.mean(expected))
    (row,) = transfer.rows_of([found])
    assert row["dice_mean"] == round(np.mean(list(found.of("mean").values())), 4)


def _scores(arm, seed, dice, protocol="probe"):
    cases = {f"case_{i}": {"Stem": float(a), "Cord": float(b)} for i, (a, b) in enumerate(dice)}
    return transfer.Scores(protocol, arm, 5, seed, cases)


def test_differences_are_paired_by_seed_and_case():
    generator = np.random.default_rng(0)
    base = generator.uniform(0.2, 0.8, (3, 10, 2))
    gain = generator.normal(0.05, 0.02, (3, 10, 2))
    scores = [_scores("scratch", seed, base[seed]) for seed in range(3)]
    scores += [_scores("toki", seed, (base + gain)[seed]) for seed in (2, 0, 1)]
    rows = {row["structure"]: row for row in transfer.paired_rows(scores)}
    assert {(row["first"], row["second"]) for row in rows.values()} == {("toki", "scratch")}
    for structure, values in (("Stem", gain[..., 0]), ("Cord", gain[..., 1]), ("mean", gain.mean(2))):
        row = rows[structure]
        cases = stats.ttest_1samp(values.mean(0), 0).confidence_interval()
        seeds = stats.ttest_1samp(values.mean(1), 0).confidence_interval()
        assert row["dice_difference"] == pytest.approx(values.mean(), abs=1e-4)
        assert (row["low_95_cases"], row["high_95_cases"]) == pytest.approx((cases.low, cases.high), abs=1e-4)
        assert (row["low_95_seeds"], row["high_95_seeds"]) == pytest.approx((seeds.low, seeds.high), abs=1e-4)
        assert row["p_wilcoxon_cases"] == pytest.approx(stats.wilcoxon(values.mean(0)).pvalue, rel=0.05)


def test_seeds_that_only_one_arm_has_are_left_out():
    dice = np.full((4, 2), 0.5)
    scores = [_scores("scratch", 0, dice), _scores("toki", 0, dice + 0.1), _scores("toki", 1, dice + 0.3)]
    row = next(row for row in transfer.paired_rows(scores) if row["structure"] == "mean")
    assert (row["seeds"], row["dice_difference"]) == (1, 0.1)
    assert row["low_95_seeds"] == ""


def test_what_has_a_result_is_not_started_again(tmp_path):
    (tmp_path / "raw" / "Dataset901_Isotropic").mkdir(parents=True)
    work = transfer.Work(tmp_path)
    everything = transfer.missing(work, "finetune")
    assert len(everything) == len(transfer.ARMS) * len(transfer.SEEDS) * len(transfer.LABELS)
    done = work.summary("linear", 20, 2)
    done.parent.mkdir(parents=True)
    done.touch()
    assert set(everything) - set(transfer.missing(work, "finetune")) == {("linear", "2", "20")}
