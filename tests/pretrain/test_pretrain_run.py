"""`medmamba pretrain run`: the same numbers however a run is cut into processes, batches and lives."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from medmamba import cli
from medmamba.weights.encoder import read_encoder
from medmamba_pretrain.corpus.crops import CropReader
from medmamba_pretrain.corpus.store import Store
from medmamba_pretrain.loop.checkpoints import Checkpoints
from medmamba_pretrain.loop.monitor import picture_of
from medmamba_pretrain.loop.normalisation import constants_of, normalise
from medmamba_pretrain.loop.stream import CropStream, crop_at, loader_of
from medmamba_pretrain.loop.validation import held_out


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory, recipe_of):
    """Writes a recipe as TOML."""

    def write(**changes) -> str:
        recipe = recipe_of(**changes)
        tables = {"arguments": recipe.arguments, "normalisation": recipe.normalisation}
        entries = {name: value for name, value in recipe.to_dict().items() if name not in tables}
        lines = [f"{name} = {_toml(value)}" for name, value in entries.items()]
        for name, table in tables.items():
            lines += [f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in table.items())]
        path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
        path.write_text("\n".join(lines))
        return str(path)

    return write


def _toml(value) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def command(recipe: str, corpus: Path, out: Path, *more: str) -> list[str]:
    return ["run", recipe, "--corpus", str(corpus), "--out", str(out), "--device", "cpu", *more]


def run(recipe: str, corpus: Path, out: Path, *more: str) -> int:
    return cli.main(["pretrain", *command(recipe, corpus, out, *more)])


def start(*arguments: str, before: list[str] | None = None, **options) -> subprocess.Popen:
    """The command in a process of its own."""
    launcher = before or [sys.executable]
    return subprocess.Popen(
        [*launcher, "-m", "medmamba_pretrain", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        **options,
    )


def last(out: Path) -> dict:
    return Checkpoints(out).latest()


def same_state(a: dict, b: dict) -> bool:
    """Weights and optimizer, bit by bit."""
    one, other = (_tensors(state["model"]) + _tensors(state["optimizer"]) for state in (a, b))
    return a["step"] == b["step"] and all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def _tensors(tree) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else []
    return [tensor for item in items for tensor in _tensors(item)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus, recipe_file) -> Path:
    """A run of six steps without a break."""
    out = tmp_path_factory.mktemp("whole")
    assert run(recipe_file(), corpus, out) == 0
    return out


#: Long enough to be ended in the middle.
LONG = {"steps": 30, "save_every": 1, "validate_every": 10}


@pytest.fixture(scope="module")
def long(tmp_path_factory, corpus, recipe_file) -> Path:
    """A run of 30 steps without a break."""
    out = tmp_path_factory.mktemp("long")
    assert run(recipe_file(**LONG), corpus, out) == 0
    return out


# One definition of a step


@pytest.mark.parametrize("more", [["--workers", "2"], ["--workers", "1", "--micro-batch", "4"]], ids=" ".join)
def test_reading_in_other_processes_changes_no_bit(whole, corpus, recipe_file, tmp_path, more):
    assert run(recipe_file(), corpus, tmp_path, *more) == 0
    assert same_state(last(tmp_path), last(whole))


@pytest.mark.parametrize(
    "objective",
    [pytest.param("mambamim", marks=pytest.mark.slow), pytest.param("autoregressive", marks=pytest.mark.nightly)],
)
def test_two_processes_micro_batches_and_one_process_are_the_same_run(corpus, recipe_file, tmp_path, objective):
    """In float64, because Adam makes a step of full length of a gradient that is nothing but rounding."""
    recipe = recipe_file(precision="float64", objective=objective, batch_size=6, horizon=0.3)
    assert run(recipe, corpus, tmp_path / "one") == 0
    assert run(recipe, corpus, tmp_path / "parts", "--micro-batch", "4") == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = start(*command(recipe, corpus, tmp_path / "two", "--micro-batch", "2"), before=torchrun)
    printed, _ = two.communicate(timeout=300)
    assert two.returncode == 0, printed
    one = last(tmp_path / "one")
    for other in (last(tmp_path / "parts"), last(tmp_path / "two")):
        for name, value in one["model"].items():
            torch.testing.assert_close(other["model"][name], value, rtol=0, atol=1e-6, msg=name)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-6)


def losses(out: Path) -> list[float]:
    return [event.value for event in events(out).Scalars("train/loss")]


def events(out: Path) -> EventAccumulator:
    return EventAccumulator(str(out / "tensorboard"), {"images": 0, "scalars": 0}).Reload()


def test_a_crop_is_a_function_of_seed_step_and_number(corpus, recipe_of):
    recipe = recipe_of()
    reader, units = CropReader(corpus, recipe.patch_size), (4, 4, 4)
    whole = CropStream(reader, recipe, units, start=0, first=0, count=4)
    later = CropStream(reader, recipe, units, start=3, first=2, count=2)
    for index in range(len(later)):
        step, number = divmod(index, 2)
        for ours, theirs in zip(later[index], whole[(3 + step) * 4 + 2 + number], strict=True):
            assert torch.equal(ours, theirs)
    assert not torch.equal(whole[0].stored, whole[1].stored)
    assert not torch.equal(whole[0].visible, whole[1].visible)
    other = CropStream(reader, recipe_of(seed=1), units, start=0, first=0, count=4)
    assert not torch.equal(whole[0].visible, other[0].visible)


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_no_batch_has_crops_of_two_steps(corpus, recipe_of, micro_batch):
    recipe = recipe_of()
    stream = CropStream(CropReader(corpus, recipe.patch_size), recipe, (4, 4, 4), start=0, first=0, count=4)
    loader = loader_of(stream, micro_batch, 0, for_gpu=False)
    batches = list(loader)
    assert len(batches) == len(loader)
    crops = torch.cat([batch.stored for batch in batches])
    assert torch.equal(crops, torch.stack([stream[i].stored for i in range(len(stream))]))
    per_step = -(-4 // micro_batch)
    sizes = [len(batch.stored) for batch in batches]
    assert all(sum(sizes[i : i + per_step]) == 4 for i in range(0, len(sizes), per_step))


# Lives


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["killed while saving", "SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_run_that_ended_early_goes_on_to_the_same_bits(long, corpus, recipe_file, tmp_path, ending):
    recipe = recipe_file(**LONG)
    out = tmp_path / "broken"
    process = start(*command(recipe, corpus, out))
    if ending == "killed while saving":
        _wait_until(lambda: out.is_dir() and any(out.glob(".checkpoint_00000000[2-9].pt.*.tmp")), process)
        process.kill()
    else:
        _wait_until(lambda: out.is_dir() and any(out.glob("checkpoint_00000000[2-9].pt")), process)
        process.send_signal(signal.Signals[ending])
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if ending == "killed while saving" else 75), printed
    reached = last(out)["step"]
    assert 1 <= reached < 30
    assert run(recipe, corpus, out) == 0
    assert same_state(last(out), last(long))
    assert losses(out) == losses(long)


@pytest.mark.slow
def test_two_processes_that_are_stopped_go_on_as_one(corpus, recipe_file, tmp_path):
    recipe = recipe_file(precision="float64", steps=24, save_every=1)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = start(*command(recipe, corpus, tmp_path / "two"), before=torchrun)
    _wait_until(lambda: (tmp_path / "two" / "checkpoint_000000003.pt").is_file(), two)
    two.terminate()
    two.communicate(timeout=120)
    assert 3 <= last(tmp_path / "two")["step"] < 24
    assert run(recipe, corpus, tmp_path / "two") == run(recipe, corpus, tmp_path / "one") == 0
    expected = last(tmp_path / "one")["model"]
    for name, value in last(tmp_path / "two")["model"].items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6, msg=name)


def _wait_until(condition, process) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end


@pytest.mark.parametrize("damage", ["cut", "empty", "other bytes", "another step"])
def test_a_broken_checkpoint_falls_back_to_the_one_before(whole, corpus, recipe_file, tmp_path, caplog, damage):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    newest = out / "checkpoint_000000006.pt"
    content = newest.read_bytes()
    if damage == "another step":
        (out / "checkpoint_000000004.pt").rename(newest)
        shutil.copy(whole / "checkpoint_000000004.pt", out)
    else:
        newest.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "other bytes": b"x" * 1000}[damage])
    assert run(recipe_file(), corpus, out) == 0
    assert "going back to the one before" in caplog.text
    assert "continuing at step 4 of 6" in caplog.text
    assert same_state(last(out), last(whole))
    assert (out / "checkpoint_000000006.broken").is_file()


def test_without_a_checkpoint_that_can_be_read_nothing_is_overwritten_in_silence(corpus, recipe_file, tmp_path, capsys):
    (tmp_path / "checkpoint_000000002.pt").write_bytes(b"torn")
    assert run(recipe_file(), corpus, tmp_path) == 2
    assert "can be read" in capsys.readouterr().err


def test_the_last_two_checkpoints_are_kept(whole):
    assert sorted(path.name for path in whole.glob("checkpoint_*")) == [
        "checkpoint_000000004.pt",
        "checkpoint_000000006.pt",
    ]


def test_a_run_of_another_recipe_is_refused_with_the_difference(whole, corpus, recipe_file, capsys):
    assert run(recipe_file(lr=5e-4), corpus, whole) == 2
    assert "lr 0.001 -> 0.0005" in capsys.readouterr().err


def test_a_corpus_that_has_changed_is_a_warning(whole, corpus, recipe_file, tmp_path, caplog):
    out, store = tmp_path / "out", tmp_path / "store"
    shutil.copytree(whole, out)
    (out / "checkpoint_000000006.pt").unlink()
    shutil.copytree(corpus, store)
    lines = (store / "manifest.jsonl").read_text().splitlines()
    (store / "manifest.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    assert run(recipe_file(), store, out) == 0
    assert "is not the corpus that" in caplog.text


@pytest.mark.parametrize("limit", [2000, 60_000])
def test_a_full_disk_ends_the_run_with_75_and_leaves_what_was_there(whole, corpus, recipe_file, tmp_path, limit):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "checkpoint_000000006.pt").unlink()
    before = (out / "checkpoint_000000004.pt").read_bytes()

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start(*command(recipe_file(), corpus, out), preexec_fn=small_files)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 75, printed
    assert "make room" in printed
    assert "Traceback" not in printed
    assert (out / "checkpoint_000000004.pt").read_bytes() == before
    assert run(recipe_file(), corpus, out) == 0
    assert same_state(last(out), last(whole))


# Damaged volumes


@pytest.fixture
def damaged(corpus, tmp_path):
    """A copy of the corpus in which some volumes are cut short."""

    def damage(count: int, of: list[str]) -> Path:
        store = tmp_path / "damaged"
        shutil.copytree(corpus, store)
        for volume in of[:count]:
            path = Store(store).volume_path(volume)
            path.write_bytes(path.read_bytes()[:100])
        return store

    return damage


def training_volumes(corpus: Path, recipe) -> list[str]:
    store = Store(corpus)
    return sorted(store.accepted.keys() - set(held_out(store, recipe.validation_patients)))


def test_a_damaged_volume_is_replaced_and_counted(damaged, corpus, recipe_of, recipe_file, tmp_path):
    store = damaged(1, training_volumes(corpus, recipe_of()))
    assert run(recipe_file(max_substituted=1.0), store, tmp_path / "out") == 0
    counted = last(tmp_path / "out")["damaged"]
    assert counted > 0
    assert [event.value for event in events(tmp_path / "out").Scalars("data/damaged")][-1] == counted


def test_too_many_damaged_volumes_end_the_run(damaged, corpus, recipe_of, recipe_file, tmp_path, capsys):
    store = damaged(4, training_volumes(corpus, recipe_of()))
    assert run(recipe_file(), store, tmp_path / "out") == 1
    assert "more than max_substituted" in capsys.readouterr().err


def test_a_crop_whose_volume_is_damaged_has_the_mask_it_would_have_had(damaged, corpus, recipe_of):
    recipe = recipe_of()
    volumes = training_volumes(corpus, recipe)
    before, after = (CropReader(store, recipe.patch_size) for store in (corpus, damaged(2, volumes)))
    for seed in range(8):
        one, other = (crop_at(reader, recipe, (4, 4, 4), np.random.default_rng(seed)) for reader in (before, after))
        assert torch.equal(one.visible, other.visible)
        assert int(other.damaged) or torch.equal(one.stored, other.stored)


# Validation and what is shown


def test_patients_of_the_validation_are_never_trained_on(corpus, recipe_of):
    store = Store(corpus)
    hidden = held_out(store, 2)
    reader = CropReader(store, (16, 16, 16), without=hidden)
    drawn = {reader.draw(np.random.default_rng(seed)).volume for seed in range(200)}
    assert drawn == store.accepted.keys() - set(hidden)
    assert held_out(store, 2) == hidden
    assert set(held_out(store, 1)) < set(hidden)


def test_tensorboard_has_every_scalar_of_every_step_and_the_pictures(whole):
    shown = events(whole)
    tags = shown.Tags()
    expected = {"train/loss", "train/lr", "train/gradient_norm", "data/damaged", "fill/mean", "fill/min", "fill/max"}
    for tag in expected:
        assert [event.step for event in shown.Scalars(tag)] == list(range(6)), tag
    assert {"time/crops_per_second", "time/data_wait_share"} <= set(tags["scalars"])
    assert [event.step for event in shown.Scalars("validation/loss")] == [4, 6]
    assert [event.step for event in shown.Images("validation/crop_0")] == [4, 6]


def test_a_picture_has_four_columns_and_three_planes():
    image = torch.linspace(0, 1, 4 * 6 * 8).view(4, 6, 8)
    visible = torch.zeros(4, 6, 8, dtype=torch.bool)
    visible[:, :3] = True
    picture = picture_of(image, visible, image)[0, ::16, ::16]
    assert picture.shape == (6 + 4 + 4, 4 * 8)
    axial = [part.flip(0, 1) for part in picture[:6].chunk(4, 1)]
    torch.testing.assert_close(axial[0], image[2])
    torch.testing.assert_close(axial[1], torch.where(visible[2], image[2], 0))
    torch.testing.assert_close(axial[2], image[2])
    assert axial[3].max() == 0


# What is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"modality": "mr"}, "holds ct, the recipe is for mr"),
        ({"spacing_mm": [1, 1, 1]}, "ingest with --spacing 1 1 1"),
        ({"validation_patients": 5}, "5 patients, and the recipe keeps 5"),
        ({"patch_size": [16, 18, 16]}, "not divisible"),
        ({"network": "vmnet"}, "no network 'vmnet'"),
        ({"variant": "huge"}, "no variant 'huge'"),
        ({"arguments": {"strides": [[1, 1, 1], [2, 2, 2]], "depth": 1}}, "depth"),
        ({"decoder_finest": 9}, "finest scale"),
        ({"fill_routes": ["dhx"]}, "dhx"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_before_the_first_step(corpus, recipe_file, tmp_path, capsys, changes, words):
    assert run(recipe_file(**changes), corpus, tmp_path) == 2
    printed = capsys.readouterr().err
    assert words in printed
    assert "internal" not in printed
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_corpus_is_refused(recipe_file, tmp_path, capsys):
    assert run(recipe_file(), tmp_path / "nothing", tmp_path / "out") == 2
    assert "medmamba pretrain ingest" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(corpus, recipe_file, tmp_path, capsys):
    recipe = recipe_file(lr=1e30, warmup_steps=0, steps=20, save_every=1)
    assert run(recipe, corpus, tmp_path) == 1
    assert "training diverged at step" in capsys.readouterr().err
    assert all(torch.isfinite(value).all() for value in last(tmp_path)["model"].values())


# The encoder


def test_the_encoder_file_holds_the_encoder_of_the_last_step_and_how_it_came_to_be(whole, corpus):
    description, tensors = read_encoder(whole / "encoder.safetensors")
    model = last(whole)["model"]
    prefix = "encoder.encoder."
    trained = {name.removeprefix(prefix): value for name, value in model.items() if name.startswith(prefix)}
    assert trained.keys() == tensors.keys()
    assert all(torch.equal(tensors[name], value) for name, value in trained.items())
    assert description.spacing_mm == (2.5, 2.0, 2.0)
    assert description.corpus == {"hash": Store(corpus).digest, "volumes": 5}
    assert description.training["steps"] == 6
    assert description.normalisation == {
        "scheme": "CTNormalization",
        "low": -175,
        "high": 250,
        "mean": -175,
        "std": 425,
    }


def test_mr_is_normalised_per_volume_in_its_own_units(corpus, recipe_of):
    recipe = recipe_of(modality="mr")
    record = next(iter(Store(corpus).accepted.values()))
    scaled = type(record)(**{**vars(record), "scale": 0.5, "offset": 10.0})
    stored = torch.arange(8, dtype=torch.int16).view(1, 1, 2, 2, 2)
    values = 0.5 * stored.double() + 10
    expected = (values - record.intensity["mean"]) / record.intensity["std"]
    constants = torch.tensor([constants_of(scaled, recipe)], dtype=torch.float64)
    torch.testing.assert_close(normalise(stored, constants, torch.float64), expected)
