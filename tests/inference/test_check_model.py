"""Cases against a model: distance from its training images, and what prediction takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import permutations, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from medmamba import cli
from medmamba.inference.check import Case, CaseReport, ChannelFacts, Reading, check_cases, examine, find_cases
from medmamba.inference.check.against_model import are_cts, model_checks, policies
from medmamba.inference.check.case_report import describe
from medmamba.inference.check.estimate import Estimate
from medmamba.inference.check.messages import MODEL_MESSAGES
from medmamba.inference.check.trial import Trial, trial_of
from medmamba.inference.model import Model, export_model, load_model
from medmamba.inference.predictor.demand import Demand, num_passes
from medmamba.inference.predictor.model_predictor import ModelPredictor
from medmamba.inference.reading import Image, read_image
from medmamba.inference.reading.content import settled
from medmamba.inference.writing import write_segmentation

MEMORY_RUN = Path(__file__).with_name("memory_run.py")
TRIAL = Trial(seconds=0.5, base_bytes=2**28, pass_bytes=2**20, threads=1)
#: Smallest and largest along D, H, W; tiles are 8 x 8 x 8 voxels of 1 mm.
SPACING = ([1.0, 1.0, 0.5], [2.0, 1.0, 1.0])
EXTENT = ([20.0, 16.0, 10.0], [80.0, 50.0, 40.0])
BAND = (-60.0, 180.0)


def ct(content: dict[str, Any]) -> None:
    """A model.json of a model for one CT."""
    content["dataset"]["channel_names"] = {"0": "CT"}
    content["plans"]["configurations"]["3d_fullres"]["normalization_schemes"] = ["CTNormalization"]
    values = {"mean": 60.0, "std": 40.0, "percentile_00_5": BAND[0], "percentile_99_5": BAND[1]}
    content["plans"]["foreground_intensity_properties_per_channel"] = {"0": values}
    content["fingerprint"]["intensities"]["0"] |= values


def trained_on(content: dict[str, Any]) -> None:
    for name, (low, high) in {"spacing_mm": SPACING, "extent_mm": EXTENT}.items():
        content["fingerprint"][name] = [low] + [high] * 6


def canonical(content: dict[str, Any]) -> None:
    content["plans"]["image_reader_writer"] = "NibabelIOWithReorient"
    content["orientation"] = "SAR"


def anisotropic(content: dict[str, Any]) -> None:
    content["plans"]["configurations"]["3d_fullres"]["spacing"] = [2.0, 1.0, 0.7]


def without_fingerprint(content: dict[str, Any]) -> None:
    content["fingerprint"] = None


@pytest.fixture(scope="module")
def model_of(tmp_path_factory, package, change_model) -> Callable[..., Model]:
    """The model of the shared package with changes to its model.json."""
    made: dict[tuple[str, ...], Model] = {}

    def make(*changes: Callable[[dict[str, Any]], None]) -> Model:
        key = tuple(change.__name__ for change in changes)
        if key not in made:
            folder = Path(shutil.copytree(package, tmp_path_factory.mktemp("model") / "model"))
            for change in changes:
                change_model(folder, change)
            made[key] = load_model(folder)
        return made[key]

    return make


def report_of(
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0),
    extent: tuple[float, ...] = (30.0, 30.0, 30.0),
    values: tuple[float, float] = (-1024.0, 1000.0),
    affine: np.ndarray | None = None,
) -> CaseReport:
    """A case that was read, with values spread evenly."""
    shape = tuple(max(1, round(mm / step)) for mm, step in zip(extent, spacing, strict=True))
    affine = np.diag([*spacing[::-1], 1.0]) if affine is None else affine
    low, high = values
    percentiles = tuple(low + share * (high - low) for share in (0.005, 0.5, 0.995))
    return CaseReport(
        "a",
        ("a.nii",),
        shape=shape,
        spacing_mm=spacing,
        extent_mm=tuple(size * step for size, step in zip(shape, spacing, strict=True)),
        affine=tuple(map(tuple, affine.tolist())),
        channels=(ChannelFacts("a.nii", "", "int16", low, high, percentiles),),
    )


def ids_of(model: Model, report: CaseReport) -> list[str]:
    return [finding.id for check in model_checks(model) for finding in check(report)]


PROVOKED = {
    "coarse": (report_of(spacing=(3.1, 1.0, 1.0)), ["MM-CK-001"]),
    "fine": (report_of(spacing=(1.0, 1.0, 0.3)), ["MM-CK-001"]),
    "one slice": (report_of(extent=(1.0, 30.0, 30.0)), ["MM-CK-002"]),
    "less than half a tile": (report_of(extent=(30.0, 30.0, 3.0)), ["MM-CK-002"]),
    "half of the smallest": (report_of(extent=(9.0, 30.0, 30.0)), ["MM-CK-002"]),
    "twice the largest": (report_of(extent=(30.0, 30.0, 81.0)), ["MM-CK-003"]),
    "scaled to 1": (report_of(values=(-1.0, 1.0)), ["MM-CK-004"]),
    "all darker": (report_of(values=(-1024.0, -100.0)), ["MM-CK-004"]),
    "shifted by 1024": (report_of(values=(0.0, 2024.0)), ["MM-CK-005"]),
    "a window": (report_of(values=(0.0, 255.0)), ["MM-CK-005"]),
    "as in training": (report_of(), []),
    "smallest and finest": (report_of(SPACING[0], EXTENT[0]), []),
    "largest and coarsest": (report_of(SPACING[1], EXTENT[1]), []),
    "without content": (report_of(values=(0.0, 0.0)), []),
}


@pytest.mark.parametrize(("report", "ids"), PROVOKED.values(), ids=PROVOKED.keys())
def test_what_is_unlike_the_training_images_has_an_id_and_is_a_note(model_of, report, ids):
    model = model_of(ct, trained_on)
    assert ids_of(model, report) == ids
    assert not any(finding.refuses for check in model_checks(model) for finding in check(report))


def test_every_message_about_models_is_in_the_catalogue_and_provoked(ids_in):
    of_costs = {"MM-CK-010", "MM-CK-011"}
    provoked = {identifier for _, ids in PROVOKED.values() for identifier in ids}
    assert provoked | of_costs == ids_in("", prefix="MM-CK-") == set(MODEL_MESSAGES)
    assert not any(message.refuses for message in MODEL_MESSAGES.values())


def test_a_note_names_the_axis_the_number_and_the_training(model_of):
    (finding,) = (f for check in model_checks(model_of(canonical, trained_on)) for f in check(PROVOKED["coarse"][0]))
    assert finding.text == "voxels of 3.1 mm foot to head (in training 1 to 2 mm)"


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_sizes_between_those_of_training_are_never_noted(model_of, data):
    within = [st.floats(low, high) for low, high in zip(*SPACING, strict=True)]
    spacing = data.draw(st.tuples(*within))
    shape = [
        data.draw(st.integers(int(np.ceil(low / step)), max(int(np.ceil(low / step)), int(high / step))))
        for low, high, step in zip(*EXTENT, spacing, strict=True)
    ]
    extent = tuple(size * step for size, step in zip(shape, spacing, strict=True))
    assert ids_of(model_of(ct, trained_on), report_of(spacing, extent)) == []


def test_a_volume_in_all_48_orientations_gets_the_same_notes_where_the_model_turns_it(model_of, tmp_path):
    model = model_of(canonical, trained_on)
    values = np.random.default_rng(0).integers(0, 9, (8, 90, 13)).astype(np.int16)
    first = nibabel.Nifti1Image(values, np.diag([0.2, 1.0, 4.0, 1.0]))
    texts = set()
    for axes, signs in product(permutations(range(3)), product((1, -1), repeat=3)):
        turned = first.as_reoriented(np.array([[axis, sign] for axis, sign in zip(axes, signs, strict=True)]))
        nibabel.save(turned, tmp_path / "turned.nii")
        report = examine(tmp_path / "turned.nii", checks=model_checks(model))
        texts.add(tuple(finding.text for finding in report.findings if finding.id.startswith("MM-CK")))
    (found,) = texts
    assert len(found) == 2


def test_where_a_network_sees_a_constant_factor_only_it_is_compared(model_of):
    dark = report_of(values=(1e-6, 2e-6))
    assert ids_of(model_of(trained_on), dark) == []
    assert ids_of(model_of(ct, trained_on), dark) == ["MM-CK-004", "MM-CK-005"]


def test_without_a_fingerprint_the_tile_is_left_to_compare_with(model_of):
    model = model_of(ct, without_fingerprint)
    assert ids_of(model, report_of((9.0, 9.0, 9.0), (900.0, 900.0, 900.0), values=(-1.0, 1.0))) == []
    assert ids_of(model, report_of(extent=(3.0, 30.0, 30.0))) == ["MM-CK-002"]


@pytest.mark.parametrize("shape_xyz", [(30, 30, 1), (1, 1, 1)], ids=str)
def test_one_slice_and_one_voxel_are_noted(model_of, write_nifti, tmp_path, shape_xyz):
    path = write_nifti(tmp_path / "a.nii", shape_xyz=shape_xyz, spacing=1.0)
    report = examine(path, checks=model_checks(model_of(trained_on)))
    assert "MM-CK-002" in [finding.id for finding in report.findings]
    assert report.status == "noted"


def test_a_report_of_images_in_memory_is_that_of_their_files(write_nifti, tmp_path):
    paths = tuple(write_nifti(tmp_path / f"a_{k:04}.nii", seed=k, shape_xyz=(9, 10, 3)) for k in range(2))
    case = Case("a", paths)
    described = describe(case, [settled(read_image(path)) for path in paths])
    assert described.findings
    assert described == replace(examine(case), seconds=0.0)


# Channels.


#: Stands for a model of two channels where only these are asked for.
TWO_CHANNELS = SimpleNamespace(
    channel_names=["ct", "PET"],
    configuration={"normalization_schemes": ["ZScoreNormalization", "ZScoreNormalization"]},
)


def test_hu_are_asked_of_the_channels_that_hold_them(model_of, tmp_path, write_nifti):
    assert are_cts(model_of()) == [False]
    assert are_cts(model_of(ct)) == [True]
    assert are_cts(TWO_CHANNELS) == [True, False]
    for k, name in enumerate(("a_0000.nii", "a_0001.nii", "b_0000.nii", "b_0001.nii")):
        path = write_nifti(tmp_path / name, seed=k)
        if name in ("a_0001.nii", "b_0000.nii"):
            values = np.arange(990, dtype=np.int32).reshape(9, 10, 11) * 100
            nibabel.save(nibabel.Nifti1Image(values, nibabel.load(path).affine), path)
    reading = Reading(policies(TWO_CHANNELS))
    a, b = check_cases(find_cases(tmp_path, TWO_CHANNELS.channel_names).cases, reading)
    assert (a.status, b.status) == ("ok", "refused")
    assert [(finding.id, finding.file) for finding in b.findings] == [("MM-IO-051", "b_0000.nii")]


def test_missing_channels_are_named_as_the_model_names_them(tmp_path, write_nifti):
    write_nifti(tmp_path / "a_0000.nii")
    (case,) = find_cases(tmp_path, TWO_CHANNELS.channel_names).cases
    assert case.problem.id == "MM-IO-060"
    assert "2 channel files of the model (a_0000.nii (ct), a_0001.nii (PET)), found 1 (a_0000.nii)" in case.problem.text
    assert "--channels" not in case.problem.text


# What prediction takes.


class Counting(ModelPredictor):
    """Counts tiles, and predicts background."""

    @property
    def _forward(self) -> Callable[[torch.Tensor], torch.Tensor]:
        tiles.clear()

        def forward(x: torch.Tensor) -> torch.Tensor:
            tiles.append(x.shape)
            return torch.zeros(1, self.model.outputs.num_heads, *x.shape[2:])

        return forward


tiles: list[torch.Size] = []


def flat(content: dict[str, Any]) -> None:
    content["plans"]["transpose_forward"], content["plans"]["transpose_backward"] = [2, 0, 1], [1, 2, 0]


@pytest.fixture(scope="module")
def flat_model(tmp_path_factory, make_trained, change_model) -> Model:
    """Of planes across the third axis."""
    folder = tmp_path_factory.mktemp("flat")
    export_model(make_trained(folder, configuration="2d").folder, folder / "model")
    change_model(folder / "model", flat)
    return load_model(folder / "model")


@pytest.mark.parametrize("kind", ["file", "SAR", "2d"])
@settings(max_examples=8, deadline=None)
@given(
    shape=st.tuples(*[st.integers(2, 24)] * 3),
    spacing=st.tuples(*[st.floats(0.6, 2.5)] * 3),
    step=st.floats(0.3, 1.0),
)
def test_as_many_tiles_are_foretold_as_are_predicted_where_nothing_is_cropped(
    model_of, flat_model, kind, shape, spacing, step
):
    models = {"file": model_of(anisotropic), "SAR": model_of(canonical, anisotropic), "2d": flat_model}
    predictor = Counting(models[kind], step=step)
    affine = np.diag([*spacing, 1.0])[:, [2, 0, 1, 3]]
    image = Image(np.random.default_rng(0).integers(1, 99, shape).astype(np.int16), affine)
    demand = Estimate(predictor).cost(describe(Case("a", (Path("a.nii"),)), [image]))
    predictor.predict([image], should_stop=lambda: False)
    assert demand.tiles == len(tiles)


@settings(max_examples=50, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 300)] * 3),
    crop=st.tuples(*[st.floats(0.0, 1.0)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 6.0)] * 3),
)
def test_a_cropped_image_takes_no_more_than_the_whole(model_of, shape, crop, spacing):
    predictor = ModelPredictor(model_of())
    whole = Demand.of(predictor, shape, spacing)
    smaller = [max(1, int(size * share)) for size, share in zip(shape, crop, strict=True)]
    part = Demand.of(predictor, smaller, spacing)
    assume(min(part.resampled) > 1)
    assert part.tiles <= whole.tiles
    assert part.preparing_bytes() <= whole.preparing_bytes()


@pytest.mark.parametrize(
    ("folds", "mirrors", "passes"), [((), True, 16), (("1",), True, 8), ((), False, 2), (("0",), False, 1)]
)
def test_a_tile_takes_a_pass_for_each_fold_and_reflection(model_of, monkeypatch, folds, mirrors, passes):
    model = model_of()
    assert (len(model.folds), len(model.mirror_axes)) == (2, 3)
    count = []
    build = Model.network

    def network(self: Model, fold: str) -> torch.nn.Module:
        built = build(self, fold)
        built.register_forward_hook(lambda *_: count.append(fold))
        return built

    monkeypatch.setattr(Model, "network", network)
    predictor = ModelPredictor(model, folds=folds, mirrors=mirrors)
    predictor.predict([Image(np.ones((8, 8, 8), np.int16), np.eye(4))], should_stop=lambda: False)
    assert num_passes(predictor) == passes == len(count)


def test_a_trial_says_what_one_pass_takes(model_of):
    trial = trial_of(ModelPredictor(model_of()))
    assert trial.seconds > 0
    assert trial.base_bytes > 2**20
    assert trial.pass_bytes >= 0


def test_time_is_that_of_all_passes_and_nothing_is_said_without_a_trial(model_of):
    report = report_of()
    cost = Estimate(ModelPredictor(model_of()), TRIAL).cost(report)
    assert cost.passes == 16 * cost.tiles
    assert cost.seconds == 0.5 * cost.passes
    untimed = Estimate(ModelPredictor(model_of())).cost(report)
    assert (untimed.seconds, untimed.peak_ram_mb) == (None, None)
    assert (untimed.tiles, untimed.output_bytes) == (cost.tiles, cost.output_bytes)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".nrrd"])
def test_no_segmentation_is_larger_than_foretold(model_of, write_image, tmp_path, suffix):
    image = read_image(write_image(tmp_path / "a.nii"))
    model = model_of()
    cost = Estimate(ModelPredictor(model)).cost(describe(Case("a", (Path("a.nii"),)), [image]))
    labels = np.random.default_rng(0).integers(0, 3, image.values.shape).astype(np.uint8)
    write_segmentation(tmp_path / f"out{suffix}", labels, image, model.labels)
    assert image.values.size < cost.output_bytes
    assert (tmp_path / f"out{suffix}").stat().st_size <= cost.output_bytes


def test_a_case_that_needs_more_memory_than_there_is_gets_a_note(model_of):
    predictor = ModelPredictor(model_of())
    fits, does_not = (Estimate(predictor, replace(TRIAL, base_bytes=size)) for size in (2**20, 2**50))
    assert fits.added_to(report_of()).findings == ()
    (finding,) = does_not.added_to(report_of()).findings
    assert (finding.id, finding.refuses) == ("MM-CK-010", False)


def test_a_disk_that_may_be_too_small_is_said_once(model_of, mount_disk):
    estimate = Estimate(ModelPredictor(model_of()))
    reports = [estimate.added_to(report_of()) for _ in range(3)]
    totals = estimate.totals(reports, mount_disk("64k") / "not" / "there yet")
    assert totals.output_bytes == 3 * reports[0].cost.output_bytes
    assert totals.free_bytes <= 2**16
    assert [finding.id for finding in totals.findings] == ["MM-CK-011"]
    assert estimate.totals(reports, mount_disk("8m")).findings == ()


#: What a real prediction held over what was foretold, both without what the process held before. The bound may be too
#: high by this much, since it adds up what does not always meet.
LEAST_USED, MOST_USED = 0.5, 1.0


@dataclass(frozen=True)
class MemoryCase:
    """A model, and an image of 16 bits.

    Attributes:
        shape, spacing: of the image.
        columns: order of the axes in its affine.
        reader: of the plans.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    classes: int = 3
    configuration: str = "3d_fullres"
    columns: tuple[int, int, int] = (0, 1, 2)
    reader: str = "SimpleITKIO"


MEMORY_CASES = {
    "as large as planned": MemoryCase((64, 200, 200), (1.0, 1.0, 1.0)),
    "resampled": MemoryCase((64, 200, 200), (1.5, 1.0, 1.0)),
    "an axis by itself": MemoryCase((32, 200, 200), (4.0, 1.0, 1.0)),
    "many classes": MemoryCase((64, 160, 160), (1.0, 0.9, 0.9), classes=40),
    "planes": MemoryCase((64, 200, 200), (1.0, 0.8, 0.8), configuration="2d"),
    "turned": MemoryCase((200, 200, 64), (1.0, 1.0, 1.0), columns=(2, 1, 0), reader="NibabelIOWithReorient"),
}


#: Those with the most that can go wrong at once; the others run nightly.
TELLING = ("resampled", "many classes")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=pytest.mark.slow if name in TELLING else pytest.mark.nightly)
        for name, case in MEMORY_CASES.items()
    ],
)
def test_a_prediction_holds_as_much_memory_as_foretold(make_trained, plans_of, tmp_path, case):
    plans = {**plans_of("PlainConvUNet"), "image_reader_writer": case.reader}
    for configuration in plans["configurations"].values():
        configuration["patch_size"] = [64] * len(configuration["patch_size"])
    labels = {"background": 0, **{f"label {k}": k for k in range(1, case.classes)}}
    trained = make_trained(tmp_path, configuration=case.configuration, labels=labels, plans=plans)
    export_model(trained.folder, tmp_path / "model")
    numbers = map(json.dumps, (case.shape, case.spacing, case.columns))
    command = [sys.executable, str(MEMORY_RUN), str(tmp_path / "model"), *numbers]
    run = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stderr
    memory = json.loads(run.stdout.splitlines()[-1])
    assert memory["measured"] > memory["before"], "the case is too small to show anything"
    used = (memory["measured"] - memory["base"]) / (memory["predicted"] - memory["base"])
    assert LEAST_USED < used <= MOST_USED, memory


# The command.


@pytest.fixture
def folder(tmp_path, write_nifti) -> Path:
    """Two good cases and one that is cut."""
    for seed in range(3):
        write_nifti(tmp_path / "images" / f"case_{seed}.nii", seed=seed, shape_xyz=(30, 30, 30), spacing=1.0)
    content = (tmp_path / "images" / "case_2.nii").read_bytes()
    (tmp_path / "images" / "case_2.nii").write_bytes(content[:-99])
    return tmp_path / "images"


def test_the_command_prints_a_line_per_case_and_one_about_all(folder, model_of, capsys, tmp_path):
    model = model_of(trained_on)
    command = ["check", str(folder), "--model", str(model.path), "--output", str(tmp_path / "out")]
    assert cli.main(command) == 3
    output = capsys.readouterr()
    *cases, total = map(json.loads, output.out.splitlines())
    assert [case["status"] for case in cases] == ["ok", "ok", "refused"]
    assert [case["cost"] is None for case in cases] == [False, False, True]
    assert all(case["cost"]["seconds"] > 0 and case["cost"]["peak_ram_mb"] > 0 for case in cases[:2])
    assert (total["record"], total["model"], "case" in total) == ("total", model.id, False)
    assert (total["cases"], total["predictable"]) == (3, 2)
    assert total["passes"] == sum(case["cost"]["passes"] for case in cases[:2])
    assert total["seconds"] == pytest.approx(sum(case["cost"]["seconds"] for case in cases[:2]))
    assert total["free_bytes"] > 0
    assert not (tmp_path / "out").exists()
    first, second = output.err.splitlines()
    assert first == "3 cases: 2 ok, 1 truncated"
    assert second.startswith("predicting 2 of 3: up to ")


def test_the_command_shows_costs_in_its_table_and_can_do_without_timing(folder, model_of, capsys):
    command = ["check", str(folder), "--table", "--model", str(model_of(trained_on).path)]
    assert cli.main(command) == 3
    head, *lines = capsys.readouterr().out.splitlines()
    assert " ".join(head.split()) == "case status voxels (x y z) spacing mm across mm axes time memory values"
    place = head.index("memory")
    assert [line[place:].split()[1] for line in lines[:2]] in (["MB", "MB"], ["GB", "GB"])
    assert cli.main([*command, "--no-timing"]) == 3
    assert lines[0][head.index("time") : head.index("values")].strip()
    head, *lines = capsys.readouterr().out.splitlines()
    assert not lines[0][head.index("time") : head.index("values")].strip()


def test_the_exit_code_is_about_refusals_and_not_about_notes(folder, model_of, capsys, write_nifti):
    model = str(model_of(trained_on).path)
    command = ["check", str(folder), "--model", model, "--no-timing"]
    (folder / "case_2.nii").unlink()
    write_nifti(folder / "thin.nii", shape_xyz=(30, 30, 2), spacing=1.0)
    assert cli.main(command) == 0
    found = {record.get("case"): record for record in map(json.loads, capsys.readouterr().out.splitlines())}
    assert "MM-CK-002" in [finding["id"] for finding in found["thin"]["findings"]]
    for path in folder.iterdir():
        path.write_bytes(b"")
    assert cli.main(command) == 4
    total = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (total["predictable"], total["passes"], total["seconds"]) == (0, 0, None)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model", "nothing"], "MM-MD-001"),
        (["--model", "MODEL", "--channels", "2"], "the model has 1 channels (MRI)"),
        (["--output", "out"], "--model MODEL"),
        (["--no-timing"], "--model MODEL"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_refused_before_anything_is_read(folder, model_of, capsys, options, says):
    options = [str(model_of(trained_on).path) if option == "MODEL" else option for option in options]
    assert cli.main(["check", str(folder), *options]) == 2
    output = capsys.readouterr()
    assert says in output.err
    assert output.out == ""


def test_a_model_that_does_not_know_its_training_images_says_so(folder, model_of, capsys):
    cli.main(["check", str(folder), "--model", str(model_of(without_fingerprint).path), "--no-timing"])
    assert "does not say what it was trained on" in capsys.readouterr().err
