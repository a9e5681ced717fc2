"""The model in tests/data/models: its labels are the stored ones to the voxel, and as good as its card says."""

from __future__ import annotations

import csv
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from medmamba.cli import main
from medmamba.inference.metrics import dice
from medmamba.inference.model import load_model

CHECKOUT = Path(__file__).resolve().parents[2]
MODEL = CHECKOUT / "tests" / "data" / "models" / "hippocampus"
GOLDEN = CHECKOUT / "tests" / "data" / "segmentations"
RAW = CHECKOUT / "medmamba" / "demo" / "data" / "Dataset004_Hippocampus"
MEASURED = CHECKOUT / "plans" / "results" / "presets.csv"
CASES = ("hippocampus_148", "hippocampus_149", "hippocampus_160", "hippocampus_221")
#: A volume smaller than a tile has one tile, whatever the step, and these have no air.
GOLDEN_OF = {"accurate": "accurate", "balanced": "balanced", "fast": "balanced"}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for case in CASES:
        (folder / f"{case}_0000.nii.gz").symlink_to(RAW / "imagesTr" / f"{case}_0000.nii.gz")
    return folder


@pytest.fixture
def use_threads(monkeypatch: pytest.MonkeyPatch):
    before = torch.get_num_threads()

    def use(number: int) -> None:
        # A number that the user chose is kept, also where there are fewer cores.
        monkeypatch.setenv("OMP_NUM_THREADS", str(number))
        torch.set_num_threads(number)

    yield use
    torch.set_num_threads(before)


def voxels(path: Path) -> NDArray[np.integer]:
    return np.asarray(nibabel.load(path).dataobj)


def assert_golden(folder: Path, preset: str) -> None:
    different = {}
    for case in CASES:
        expected, found = (nibabel.load(each / f"{case}.nii.gz") for each in (GOLDEN / GOLDEN_OF[preset], folder))
        assert np.array_equal(found.affine, expected.affine)
        different[case] = int((np.asarray(found.dataobj) != np.asarray(expected.dataobj)).sum())
    assert not any(different.values()), f"voxels with another label: {different}; see {GOLDEN / 'README.md'}"


def arguments(images: Path, out: Path, preset: str) -> list[str]:
    files = ["-m", str(MODEL), "-i", str(images), "-o", str(out)]
    return ["predict", *files, "--preset", preset, "--device", "cpu", "--no-preview"]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("preset", [pytest.param("accurate", marks=pytest.mark.slow), "balanced", "fast"])
def test_labels_are_the_stored_ones_for_every_preset_and_number_of_threads(
    preset, threads, images, tmp_path, use_threads: Callable[[int], None]
):
    use_threads(threads)
    assert main(arguments(images, tmp_path / "out", preset)) == 0
    assert_golden(tmp_path / "out", preset)


@pytest.mark.slow
@pytest.mark.parametrize(
    "less",
    [
        {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
        {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
        {"MEDMAMBA_BACKEND": "torch"},
    ],
    ids=["SSE 4.1", "AVX2", "no native library"],
)
def test_an_older_processor_and_a_wheel_without_native_library_give_the_same_labels(less, images, tmp_path):
    program = "import sys; from medmamba.cli import main; sys.exit(main())"
    command = [sys.executable, "-P", "-c", program, *arguments(images, tmp_path / "out", "balanced")]
    done = subprocess.run(command, env={**os.environ, **less}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert_golden(tmp_path / "out", "balanced")


# --- how good they are ----------------------------------------------------------------------------------------------


def measured(preset: str) -> dict[str, dict[str, float]]:
    """Case -> label -> Dice, from plans/results."""
    scores: dict[str, dict[str, float]] = {}
    with MEASURED.open(encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            if row["preset"] == preset:
                scores.setdefault(row["case"], {})[row["label"]] = float(row["dice"])
    return scores


def means(scores: dict[str, dict[str, float]]) -> list[float]:
    return [statistics.mean(labels.values()) for labels in scores.values()]


def scores_of(preset: str) -> dict[str, dict[str, float]]:
    """The same for the stored segmentations, computed now."""
    names = {name: value for value, name in load_model(MODEL).labels.items() if value}
    scores = {}
    for case in CASES:
        found = voxels(GOLDEN / GOLDEN_OF[preset] / f"{case}.nii.gz")
        truth = voxels(RAW / "labelsTr" / f"{case}.nii.gz")
        scores[case] = {name: dice(found == value, truth == value) for name, value in names.items()}
    return scores


def test_the_dice_of_the_card_is_what_predict_reaches_on_the_same_cases():
    """Of nnU-Net's validation, before the weights were rounded; a standard error of the 39 cases is 0.007."""
    metrics = load_model(MODEL).description.metrics["folds"]["0"]
    found = means(measured("accurate"))
    assert len(found) == metrics["cases"]
    assert statistics.mean(found) == pytest.approx(metrics["foreground_mean"]["Dice"], abs=0.0005)


@pytest.mark.parametrize("preset", GOLDEN_OF)
def test_four_volumes_that_it_never_saw_have_the_dice_that_the_card_lets_expect(preset):
    """Their mean is at most two standard errors below that of the validation, of which they are a part."""
    all_cases, ours = measured(preset), scores_of(preset)
    for case, labels in ours.items():
        assert labels == pytest.approx(all_cases[case], abs=0.00005)
    expected = load_model(MODEL).description.metrics["folds"]["0"]["foreground_mean"]["Dice"]
    error = statistics.stdev(means(all_cases)) / len(CASES) ** 0.5
    assert statistics.mean(means(ours)) > expected - 2 * error


def test_the_card_is_filled_in_and_names_licence_and_source():
    card = load_model(MODEL).card
    assert "To be filled in" not in card
    assert "CC BY-SA 4.0" in card
    assert "medicaldecathlon.com" in card
    assert "not a medical device" in card


def test_it_stays_small():
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 2e6
