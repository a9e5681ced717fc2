"""What a training writes for TensorBoard is there when it is read back, and a full disk does not end the training."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from medmamba.diagnostics import StepSizes, memory_tokens, step_sizes
from medmamba.networks import NETWORKS, create_network
from medmamba.training.board import Board, scan_scalars

STRIDES = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={TENSORS: 0}).Reload()


def curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, pytest.approx(event.value)) for event in read(folder).Scalars(tag)]


@pytest.fixture
def board(tmp_path) -> Iterator[Board]:
    board = Board(tmp_path, start=0, class_names=["anterior", "posterior"])
    yield board
    board.close()


def test_what_nnunet_logs_has_readable_names(board, tmp_path):
    from nnunetv2.training.logging.nnunet_logger import MetaLogger

    logger = MetaLogger(str(tmp_path), False)
    logger.loggers.append(board)
    logger.update_config({"hparas": {"batch_size": 2}})
    for epoch, dice in enumerate([(0.5, 0.25), (0.75, math.nan)]):
        logger.log("epoch_start_timestamps", 100.0 * epoch, epoch)
        logger.log("lrs", 0.01, epoch)
        logger.log("train_losses", np.float32(-0.5), epoch)
        logger.log("val_losses", -0.25, epoch)
        logger.log("mean_fg_dice", np.nanmean(dice), epoch)
        logger.log("dice_per_class_or_region", list(dice), epoch)
        logger.log("epoch_end_timestamps", (7.0, 107.0)[epoch], epoch)
    logger.log_summary("final_val/foreground_dice", np.float64(0.9))
    board.close()
    assert set(read(tmp_path).Tags()["scalars"]) == {
        *("lr", "loss/train", "loss/validation", "dice/mean", "dice/ema", "dice/anterior", "dice/posterior"),
        *("time/epoch_s", "summary/final_val/foreground_dice"),
    }
    assert curve(tmp_path, "dice/mean") == [(0, 0.375), (1, 0.75)]
    assert curve(tmp_path, "dice/ema") == [(0, 0.375), (1, 0.9 * 0.375 + 0.1 * 0.75)]
    assert curve(tmp_path, "dice/anterior") == [(0, 0.5), (1, 0.75)]
    assert curve(tmp_path, "dice/posterior") == [(0, 0.25)]  # no patch of epoch 1 held it
    assert curve(tmp_path, "time/epoch_s") == [(0, 7), (1, 7)]


def test_a_name_that_nobody_knows_is_kept(board, tmp_path):
    board.log("new_in_nnunet", 3.0, 4)
    board.log("dice_per_class_or_region/class_3", 0.5, 4)
    board.close()
    assert curve(tmp_path, "new_in_nnunet") == [(4, 3.0)]
    assert curve(tmp_path, "dice/class_3") == [(4, 0.5)]


def test_a_loss_that_is_no_number_is_shown(board, tmp_path):
    board.log("train_losses", math.nan, 0)
    board.close()
    (event,) = read(tmp_path).Scalars("loss/train")
    assert math.isnan(event.value)


def test_an_end_without_its_start_has_no_time(board, tmp_path):
    """A process that goes on in the middle of an epoch."""
    board.log("epoch_end_timestamps", 100.0, 3)
    board.close()
    assert read(tmp_path).Tags()["scalars"] == []


def test_a_resumed_run_goes_on_where_it_was(tmp_path):
    for start, stop, value in [(0, 4, 1.0), (2, 5, 2.0)]:
        board = Board(tmp_path, start=start, class_names=[])
        board.update_config({"life": value})
        for epoch in range(start, stop):
            board.log("train_losses", value, epoch)
            board.scalars({"time/data_wait_s": value}, epoch)
        board.close()
    whole = [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0)]
    assert curve(tmp_path, "loss/train") == whole
    assert curve(tmp_path, "time/data_wait_s") == whole


def test_what_an_epoch_wrote_survives_a_kill(tmp_path):
    code = f"""
        import os
        from pathlib import Path
        from medmamba.training.board import Board
        board = Board(Path({str(tmp_path)!r}), start=0, class_names=[])
        for epoch in range(3):
            board.log("epoch_start_timestamps", 0.0, epoch)
            board.log("train_losses", 0.5, epoch)
            board.log("epoch_end_timestamps", 1.0, epoch)
        os.kill(os.getpid(), 9)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=300).returncode == -9
    assert curve(tmp_path, "loss/train") == [(0, 0.5), (1, 0.5), (2, 0.5)]


def text(folder: Path, tag: str) -> str:
    (event,) = read(folder).Tensors(f"{tag}/text_summary")
    return event.tensor_proto.string_val[0].decode()


def test_settings_are_text(board, tmp_path):
    board.update_config({"plans": {"patch_size": [8, 8], "path": Path("x")}, "device": "cpu", "long": ["word"] * 10**5})
    board.close()
    assert json.loads(text(tmp_path, "config/plans").strip("`json\n")) == {"patch_size": [8, 8], "path": "x"}
    assert text(tmp_path, "config/device") == "cpu"
    assert "characters more" in text(tmp_path, "config/long")
    assert len(text(tmp_path, "config/long")) < 21_000


def test_hyperparameters_are_in_the_same_file_once(board, tmp_path):
    board.hparams({"plans": "abc123", "epochs": 50, "lr": 0.01, "is_fine": True})
    board.hparams({"plans": "other"})
    board.close()
    (path,) = tmp_path.iterdir()  # a run of its own would be a folder
    assert path.is_file()
    content = {
        tag: HParamsPluginData.FromString(blob) for tag, blob in read(tmp_path).PluginTagToContent("hparams").items()
    }
    session = content["_hparams_/session_start_info"].session_start_info.hparams
    assert session["plans"].string_value == "abc123"
    assert session["epochs"].number_value == 50
    (metric,) = content["_hparams_/experiment"].experiment.metric_infos
    assert metric.name.tag == "dice/ema"
    assert "_hparams_/session_end_info" not in content


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_network_has_statistics_per_stage_with_scans(name):
    network = create_network(name, 1, 2, strides=STRIDES)
    sizes = step_sizes(network.state_dict())
    found = scan_scalars(sizes)
    assert bool(found) == NETWORKS[name].has_scans
    stages = {tag.split("/")[1] for tag in found}
    parts = {"encoder": network.encoder, "decoder": network.decoder}
    expected = {
        f"{part}.stage_{i}"
        for part, module in parts.items()
        for i, stage in enumerate(module.stages)
        if step_sizes(stage.state_dict())
    }
    assert stages == expected
    for stage in stages:
        low, mean, high = (found[f"scan/{stage}/dt_{kind}"] for kind in ("min", "mean", "max"))
        assert 1e-4 < low < mean < high < 0.2
        fast, median, slow = (found[f"scan/{stage}/memory_tokens_p{kind}"] for kind in (10, 50, 90))
        assert 0 < fast <= median <= slow


@pytest.mark.parametrize("shape_of_A", [(2, 30, 4), (2, 30, 1), (2, 30)], ids=["S6", "one state", "SSD"])
def test_statistics_of_a_stage_are_over_all_its_scans(shape_of_A):
    generator = torch.Generator().manual_seed(0)
    scans = [
        StepSizes(torch.rand(2, 30, generator=generator) + 0.01, -1 - torch.rand(shape_of_A, generator=generator))
        for _ in range(3)
    ]
    found = scan_scalars({f"module.encoder.stages.1.body.{i}.core": scan for i, scan in enumerate(scans)})
    dt = torch.stack([scan.dt for scan in scans]).double()
    memory = torch.cat([memory_tokens(scan.dt, scan.A).flatten() for scan in scans])
    assert found["scan/encoder.stage_1/dt_mean"] == pytest.approx(dt.mean().item())
    assert found["scan/encoder.stage_1/dt_min"] == dt.min()
    assert found["scan/encoder.stage_1/dt_max"] == dt.max()
    for name, level in (("p10", 0.1), ("p50", 0.5), ("p90", 0.9)):
        bound = found[f"scan/encoder.stage_1/memory_tokens_{name}"]
        assert (memory < bound).double().mean() <= level <= (memory <= bound).double().mean()


def test_a_scan_that_forgets_nothing_has_a_memory_without_end(board, tmp_path):
    board.scans({"encoder.stages.0.core": StepSizes(torch.zeros(1, 3), -torch.ones(1, 3, 2))}, 1)
    board.close()
    assert curve(tmp_path, "scan/encoder.stage_0/memory_tokens_p50") == [(1, math.inf)]


def image_of(folder: Path, tag: str) -> np.ndarray:
    (event,) = read(folder).Images(tag)
    return np.asarray(Image.open(BytesIO(event.encoded_image_string)))


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_planes_of_a_volume_are_an_image(board, tmp_path, kind):
    image, labels = np.random.default_rng(0).random((12, 20, 16)), np.zeros((12, 20, 16), np.int64)
    labels[3:6, 4:9, 5:7] = 1
    board.overlay(kind(image), kind(labels * 2), kind(labels), 10, "case_1")
    board.close()
    picture = image_of(tmp_path, "overlay/case_1")
    assert picture.ndim == 3
    assert picture.dtype == np.uint8
    assert read(tmp_path).Images("overlay/case_1")[0].step == 10


def full_disk(folder: Path) -> str:
    """Code of a child process that writes a board until well after its disk is full, then goes on."""
    code = f"""
        import logging
        from pathlib import Path
        import torch
        from medmamba.training.board import Board
        logging.basicConfig(format="%(levelname)s %(message)s")
        board = Board(Path({str(folder)!r}), start=0, class_names=["a"])
        board.update_config({{"plans": "x" * 1000}})
        board.hparams({{"lr": 0.1}})
        picture, labels = torch.rand(64, 64), torch.ones(64, 64)
        for epoch in range(60):
            board.log("train_losses", 1.0, epoch)
            board.scalars({{"time/epoch_s": 1.0}}, epoch)
            board.overlay(picture, labels, labels, epoch, "case")
        print("on" if board.is_on else "off")
        board.log_summary("dice", 0.5)
        board.close()
        print("survived")
    """
    return textwrap.dedent(code)


def assert_survived_with_one_warning(code: str) -> None:
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    assert child.stdout.split() == ["off", "survived"]
    assert child.stderr.count("WARNING nothing more is written to") == 1, child.stderr
    assert "Traceback" not in child.stderr


def test_a_full_disk_is_one_warning(tmp_path):
    (tmp_path / "disk").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path / "disk"], check=False).returncode:
        pytest.skip("a small file system cannot be mounted here: no right to")
    try:
        assert_survived_with_one_warning(full_disk(tmp_path / "disk" / "tensorboard"))
        assert curve(tmp_path / "disk" / "tensorboard", "loss/train")[0] == (0, 1.0)  # what fitted is there
    finally:
        subprocess.run(["umount", tmp_path / "disk"], check=True)


@pytest.mark.parametrize("limit", [*(pytest.param(n, marks=pytest.mark.nightly) for n in (0, 200, 40_000)), 3000])
def test_a_file_that_may_not_grow_is_one_warning(tmp_path, limit):
    code = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    assert_survived_with_one_warning(code + full_disk(tmp_path))


def test_a_folder_that_cannot_be_made_is_one_warning(tmp_path, caplog):
    (tmp_path / "tensorboard").touch()
    with caplog.at_level(logging.WARNING):
        board = Board(tmp_path / "tensorboard", start=0, class_names=[])
        board.log("train_losses", 1.0, 0)
        board.hparams({"lr": 0.1})
        board.close()
    assert not board.is_on
    assert len([record for record in caplog.records if "nothing more is written" in record.message]) == 1


def test_nothing_is_written_after_the_end(board, tmp_path):
    board.close()
    board.log("train_losses", 1.0, 0)
    board.close()
    assert read(tmp_path).Tags()["scalars"] == []
