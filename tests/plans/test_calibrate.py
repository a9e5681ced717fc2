"""Measured memory of trainings, and the coefficients fitted to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medmamba.cli import main
from medmamba.command import CommandError
from medmamba.diagnostics import Footprint, MemoryModel
from medmamba.diagnostics.memory import MODEL_FILE
from medmamba.networks import NETWORKS
from medmamba_plans import calibrate
from medmamba_plans.calibrate import MIB, Case

RESULTS = Path(__file__).resolve().parents[2] / "plans" / "results"
SMALL = {"base_features": 8, "depths": 1, "decoder_depths": 1, "d_state": 4}


def row(parameters: int, live: float, batch: int, peak: float, **facts) -> dict[str, object]:
    return {
        "parameters": parameters,
        "live_mib": live,
        "batch_size": batch,
        "peak_mib": peak,
        "is_compiled": 0,
        **facts,
    }


def exact_rows(fixed: float, per_parameter: float, factor: float) -> list[dict[str, object]]:
    sizes = [(2**20, 100.0, 2), (30 * 2**20, 500.0, 1), (5 * 2**20, 50.0, 16), (60 * 2**20, 10.0, 4)]
    return [row(p, live, b, fixed + per_parameter * p / MIB + factor * b * live) for p, live, b in sizes]


def test_the_fit_finds_the_line_that_made_the_rows():
    found = calibrate.fit(exact_rows(300, 12, 1.25), "invented")
    assert (found.model.fixed / MIB, found.model.bytes_per_parameter) == pytest.approx((300, 12), rel=1e-3)
    assert found.model.factor == pytest.approx(1.25, rel=1e-3)
    assert found.model.is_calibrated
    assert found.ratios == pytest.approx([1] * 4)


def test_no_coefficient_is_negative():
    rows = exact_rows(0, 12, 1.25)
    for each in rows:
        each["peak_mib"] -= 20
    model = calibrate.fit(rows, "invented").model
    assert min(model.fixed, model.bytes_per_parameter, model.factor) >= 0


def test_too_few_rows_are_refused():
    with pytest.raises(CommandError, match="cannot be fitted to 2 measurements"):
        calibrate.fit(exact_rows(1, 1, 1)[:2], "invented")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_cases_hold_every_network_and_nnunets_own(device):
    cases = calibrate.cases(device)
    assert {case.network for case in cases} == {*NETWORKS, *calibrate.STOCK}
    assert len({case.name + str(case.num_classes) for case in cases}) == len(cases)
    for case in cases:
        assert len(case.block()["arch_kwargs"]["strides"][0]) == len(case.patch_size)


def test_the_shipped_coefficients_are_those_of_the_shipped_measurements():
    rows = calibrate.read(RESULTS / "memory_cpu.csv")
    found, shipped = calibrate.fit(rows, "").model, MemoryModel.load("cpu")
    assert shipped.is_calibrated
    assert (found.fixed, found.bytes_per_parameter, found.factor) == pytest.approx(
        (shipped.fixed, shipped.bytes_per_parameter, shipped.factor), rel=1e-3
    )


def test_the_shipped_measurements_are_predicted_within_a_tenth():
    model = MemoryModel.load("cpu")
    for each in calibrate.read(RESULTS / "memory_cpu.csv"):
        counted = Footprint(0, round(float(each["live_mib"]) * MIB), int(each["parameters"]))
        assert model.peak(counted, int(each["batch_size"])) / MIB == pytest.approx(float(each["peak_mib"]), rel=0.1), (
            each
        )


@pytest.mark.bench
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from Linux")
@pytest.mark.parametrize(
    "case",
    [
        Case("vmunet", (48, 48, 32), 2, ((1, 1, 1), *((2, 2, 2),) * 3)),
        Case("vmunet", (32, 64, 40), 3, ((1, 1, 1), *((2, 2, 2),) * 3), input_channels=2),
        Case("PlainConvUNet", (24, 64, 64), 2, ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2))),
        Case("vmunet", (192, 192), 3, ((1, 1), *((2, 2),) * 5), num_classes=5),
    ],
    ids=lambda case: case.name,
)
def test_predictions_agree_with_new_measurements(case):
    (measured,) = calibrate.measure([case], "cpu")
    counted = Footprint(0, round(measured["live_mib"] * MIB), measured["parameters"])
    predicted = MemoryModel.load("cpu").peak(counted, case.batch_size) / MIB
    assert predicted == pytest.approx(measured["peak_mib"], rel=0.2)


def test_a_training_that_fails_is_named(monkeypatch):
    case = Case("vmunet", (16, 16, 16), 1, ((1, 1, 1), *((2, 2, 2),) * 2), SMALL)
    monkeypatch.setattr(calibrate, "_CALM_ALLOCATOR", {"MEDMAMBA_BACKEND": "none"})
    with pytest.raises(CommandError, match=r"vmunet .* on cpu cannot be measured: .*unknown scan backend"):
        list(calibrate.measure([case], "cpu"))


def test_the_command_goes_on_after_a_training_that_fails(tmp_path, monkeypatch, capsys):
    small, failing, other = (Case("vmunet", (n, 16, 16), 1, ()) for n in (16, 32, 48))

    def measure(chosen, device, is_compiled):
        if chosen == [failing]:
            raise CommandError(f"{failing.name} on cpu cannot be measured: out of memory", 1)
        yield {"device": device, **row(1000, 20.0, 1, 30.0)}

    monkeypatch.setattr(calibrate, "cases", lambda device: [small, failing, other])
    monkeypatch.setattr(calibrate, "measure", measure)
    out = tmp_path / "memory.csv"
    assert main(["calibrate", "--device", "cpu", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "left out: vmunet 32x16x16 batch 1 on cpu cannot be measured: out of memory" in printed
    assert "too few measurements to fit the coefficients: 2" in printed
    assert len(calibrate.read(out)) == 2
    assert main(["calibrate", "--device", "cpu", "--case", "32x"]) == 1
    assert "no training could be measured" in capsys.readouterr().err


@pytest.fixture
def invented(tmp_path) -> Path:
    path = tmp_path / "gpu.csv"
    facts = {"processor": "A GPU", "torch": "2.8", "medmamba": "1", "commit": ""}
    calibrate.write([{"device": "cuda", **each} for each in exact_rows(900, 14, 1.3)], facts, path)
    return path


def test_measurements_of_a_gpu_are_fitted_without_one(invented, tmp_path, monkeypatch, capsys):
    from medmamba.diagnostics import memory

    model_file = tmp_path / "model.json"
    model_file.write_text(MODEL_FILE.read_text())
    monkeypatch.setattr(memory, "MODEL_FILE", model_file)
    before = model_file.read_text()
    assert main(["calibrate", "--csv", str(invented)]) == 0
    assert model_file.read_text() == before
    assert main(["calibrate", "--csv", str(invented), "--fit"]) == 0
    assert "cuda: 900 MiB + 14 bytes per parameter + 1.3 x counted" in capsys.readouterr().out
    assert json.loads(model_file.read_text())["cpu"] == json.loads(before)["cpu"]
    model = MemoryModel.load("cuda", model_file)
    assert model.is_calibrated
    assert "A GPU" in model.source


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--device cpu --case nothing", "no training's name contains 'nothing'; known: "),
        ("--csv /nowhere.csv", "/nowhere.csv cannot be read"),
        ("--device cpu --out /nowhere/x.csv", "is not a folder"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert main(["calibrate", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
