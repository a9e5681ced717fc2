"""Measure prediction on a CPU, ours beside nnU-Net's, and add rows to a CSV.

    python plans/results/prediction.py patch OUT.csv [--size 128] [--threads 1]
    python plans/results/prediction.py volume OUT.csv NAME IMAGE PLANS [--views one] [--threads 1]
    python plans/results/prediction.py export OUT.csv [--classes 3 8 40] [--threads 1]
    python plans/results/prediction.py air OUT.csv NAME IMAGE PLANS

``patch``: one forward pass of a network, with both memory formats. ``volume``: nnU-Net's predictor and ours from one
checkpoint (weights are random) on a real image, from the image in memory to labels in memory. ``export``: the same for
a network of next to no cost, many classes and a volume of 10 million voxels. ``air``: tiles that are empty, without a
forward pass. What is compared runs in one process by turns; the figure is the least of ``--repeats``. Peak memory is
that of a process that does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from medmamba.bench.commit import commit_of
from medmamba.inference.machine import peak_bytes
from medmamba.inference.model import export_model, load_model
from medmamba.inference.model.labels import read_labels
from medmamba.inference.predictor.case import Window, predict_case
from medmamba.inference.predictor.model_predictor import ModelPredictor
from medmamba.inference.presets import PRESETS
from medmamba.inference.reading import Image, read_image
from medmamba.networks import create_network

COLUMNS = (
    *("question", "case", "what", "threads", "wall_s", "cpu_s", "peak_mib", "tiles", "tiles_computed", "repeats"),
    *("note", "load", "processor", "torch", "nnunetv2", "commit"),
)
FORMATS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last_3d}
STRIDES = [[1, 1, 1], *[[2, 2, 2]] * 5]
WIDTHS = [32, 64, 128, 256, 320, 320]
EXPORT_SHAPE, EXPORT_PLANNED, EXPORT_TILE = (160, 256, 256), (1.5, 1.5, 1.5), (64, 64, 64)
Call = Callable[[], dict[str, Any]]


def plain_conv_unet() -> nn.Module:
    """nnU-Net's own network at the usual plan."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    return PlainConvUNet(
        1, 6, WIDTHS, nn.Conv3d, 3, STRIDES, 2, 3, 2, conv_bias=True, norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "PlainConvUNet": plain_conv_unet,
    **{
        name: lambda name=name: create_network(name, 1, 3, strides=STRIDES, deep_supervision=False)
        for name in ("vmunet", "mhsvm", "msvmunet", "mednext", "mednextmamba")
    },
}


def by_turns(calls: dict[str, Call], repeats: int) -> dict[str, dict[str, Any]]:
    """Least wall and CPU seconds of each, after one call of each that does not count where there are several."""
    results: dict[str, dict[str, Any]] = {}
    for turn in range(repeats + (repeats > 1)):
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            facts = call()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            before = results.get(name) if turn > 1 or repeats == 1 else None
            results[name] = facts | {
                "wall_s": min(wall, before["wall_s"]) if before else wall,
                "cpu_s": min(cpu, before["cpu_s"]) if before else cpu,
                "repeats": repeats,
            }
    return results


def measure_patch(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    patch = torch.randn(1, 1, *[arguments.size] * 3)
    for name in arguments.networks or NETWORKS:
        network = NETWORKS[name]().eval()
        logits: dict[str, torch.Tensor] = {}

        def forward(memory_format: str, network: nn.Module = network, logits: Any = logits) -> dict[str, Any]:
            with torch.inference_mode():
                logits[memory_format] = network(patch.to(memory_format=FORMATS[memory_format]))
            return {}

        def last(network: nn.Module = network) -> nn.Module:
            return deepcopy(network).to(memory_format=torch.channels_last_3d)

        networks = {"channels first": network, "channels last": last()}
        calls: dict[str, Call] = {
            each: lambda each=each: forward(each, networks[each])  # noqa: B023
            for each in FORMATS
        }
        first, second = by_turns(calls, arguments.repeats), logits
        error = (second["channels first"] - second["channels last"]).abs().max() / second["channels first"].std()
        for each, row in first.items():
            note = "" if each == "channels first" else f"logits differ by at most {error:.1e} of their deviation"
            yield row | {"case": f"{name} {arguments.size}", "what": each, "note": note}


def trained_folder(folder: Path, plans: dict[str, Any], classes: int) -> Path:
    """What a training with nnU-Net's trainer leaves, with random weights."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    block = plans["configurations"]["3d_fullres"]["architecture"]
    torch.manual_seed(0)
    network = get_network_from_plans(
        block["network_class_name"], block["arch_kwargs"], block["_kw_requires_import"], 1, classes,
        deep_supervision=False,
    )  # fmt: skip
    labels = {"background": 0, **{f"organ {k}": k for k in range(1, classes)}}
    dataset = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"}
    run = folder / plans["dataset_name"] / f"nnUNetTrainer__{plans['plans_name']}__3d_fullres"
    (run / "fold_0").mkdir(parents=True)
    (run / "plans.json").write_text(json.dumps(plans))
    (run / "dataset.json").write_text(json.dumps(dataset))
    checkpoint = {
        "network_weights": network.state_dict(),
        "current_epoch": 1000,
        "init_args": {"plans": plans, "configuration": "3d_fullres", "fold": 0, "dataset_json": dataset},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    torch.save(checkpoint, run / "fold_0" / "checkpoint_final.pth")
    return run


def stock(run: Path, image: Image, mirrors: bool) -> Call:
    """nnU-Net's predictor, ready to predict."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    with contextlib.redirect_stdout(io.StringIO()):
        predictor = nnUNetPredictor(use_mirroring=mirrors, device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(run), ("0",))

    def call() -> dict[str, Any]:
        values = np.asarray(image.values, np.float32)[None]
        predictor.predict_single_npy_array(values, {"spacing": list(image.spacing_mm)})
        return {}

    return call


def ours(package: Path, image: Image, preset: str, mirrors: bool) -> Call:
    settings = asdict(PRESETS[preset])
    predictor = ModelPredictor(load_model(package), **settings | {"mirrors": mirrors and settings["mirrors"]})
    predictor.prepare()

    def call() -> dict[str, Any]:
        facts = predictor.predict([image], should_stop=lambda: False).facts
        return {name: facts[name] for name in ("tiles", "tiles_computed")}

    return call


def callable_of(what: str, run: Path, image: Image) -> Call:
    """By the name of a row: "nnU-Net", "nnU-Net, one view", or a preset of ours."""
    name, _, view = what.partition(", ")
    mirrors = view != "one view"
    return stock(run, image, mirrors) if name == "nnU-Net" else ours(run.parent / "model", image, name, mirrors)


def measure_cases(run: Path, image_file: Path, names: list[str], repeats: int) -> Iterator[dict[str, Any]]:
    """Times of several predictors by turns, then the peak of each alone."""
    image = read_image(image_file)
    rows = by_turns({what: callable_of(what, run, image) for what in names}, repeats)
    for what, row in rows.items():
        yield row | {"what": what, "peak_mib": peak_of(what, run, image_file)}


def peak_of(what: str, run: Path, image: Path) -> int:
    command = [
        sys.executable,
        __file__,
        "alone",
        "",
        what,
        str(run),
        str(image),
        "--threads",
        str(torch.get_num_threads()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return round(int(done.stdout.split()[-1]) / 2**20)


def alone(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Predict once and say the peak, in bytes."""
    what, run, image = arguments.words
    callable_of(what, Path(run), read_image(Path(image)))()
    print(peak_bytes())
    yield from ()


def measure_volume(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    name, image, plans = arguments.words
    names = ["nnU-Net, one view", "accurate, one view", "balanced", "fast"]
    if arguments.views == "all":
        names = ["nnU-Net", "accurate", *names]
    with tempfile.TemporaryDirectory() as folder:
        run = trained_folder(Path(folder), json.loads(Path(plans).read_text()), 3)
        export_model(run, run.parent / "model")
        shape = "x".join(map(str, read_image(Path(image)).values.shape))
        for row in measure_cases(run, Path(image), names, arguments.repeats):
            yield row | {"case": f"{name} {shape}"}


def measure_export(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    import nibabel

    plans = export_plans()
    generator = np.random.default_rng(0)
    values = generator.normal(0, 20, EXPORT_SHAPE[::-1]).astype(np.int16)
    values[60:200, 60:200, 20:140] += 300
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.nii"
        nifti = nibabel.Nifti1Image(values, np.eye(4))
        nifti.header.set_xyzt_units("mm")
        nibabel.save(nifti, image)
        for classes in arguments.classes:
            run = trained_folder(Path(folder) / str(classes), plans, classes)
            export_model(run, run.parent / "model")
            for row in measure_cases(run, image, ["nnU-Net, one view", "accurate, one view"], arguments.repeats):
                yield row | {"case": f"{classes} classes {'x'.join(map(str, EXPORT_SHAPE))}"}


def export_plans() -> dict[str, Any]:
    """Plans for a convolution network of two stages and four channels."""
    plans: dict[str, Any] = json.loads(
        (Path(__file__).parents[2] / "tests" / "data" / "plans" / "isotropic.json").read_text()
    )
    settings = plans["configurations"]["3d_fullres"]
    settings |= {"patch_size": list(EXPORT_TILE), "spacing": list(EXPORT_PLANNED)}
    arguments = settings["architecture"]["arch_kwargs"]
    for key, value in arguments.items():
        if isinstance(value, list):
            arguments[key] = value[: 1 if key == "n_conv_per_stage_decoder" else 2]
    arguments |= {"n_stages": 2, "features_per_stage": [4, 4]}
    return plans


def measure_air(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    name, file, plans_file = arguments.words
    plans, image = json.loads(Path(plans_file).read_text()), read_image(Path(file))
    labels = read_labels({"labels": {"background": 0, "organ": 1}})
    for patch in (plans["configurations"]["3d_fullres"]["patch_size"], [48, 64, 64], [32, 48, 48]):
        plans["configurations"]["3d_fullres"]["patch_size"] = patch
        window = Window(skips_air=True)
        predict_case(
            image.values[None], image.spacing_mm, lambda x: torch.zeros(1, 2, *x.shape[2:]), plans, "3d_fullres",
            labels, window,
        )  # fmt: skip
        yield {
            "case": f"{name} {'x'.join(map(str, image.values.shape))}",
            "what": f"tiles of {'x'.join(map(str, patch))}",
            **{key: window.facts[key] for key in ("tiles", "tiles_computed")},
        }


QUESTIONS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "patch": measure_patch,
    "volume": measure_volume,
    "export": measure_export,
    "air": measure_air,
    "alone": alone,
}


def machine() -> dict[str, str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "processor": next(line.partition(": ")[2] for line in lines if line.startswith("model name")),
        "torch": torch.__version__,
        "nnunetv2": version("nnunetv2"),
        "commit": commit_of(Path(__file__)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("question", choices=QUESTIONS)
    parser.add_argument("out")
    parser.add_argument("words", nargs="*", metavar="NAME IMAGE PLANS")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS)
    parser.add_argument("--views", choices=["one", "all"], default="one")
    parser.add_argument("--classes", type=int, nargs="+", default=[3, 8, 40])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    facts = machine() if arguments.question != "alone" else {}
    for row in QUESTIONS[arguments.question](arguments):
        for name in ("wall_s", "cpu_s"):
            if name in row:
                row[name] = round(row[name], 3)
        load = f"{os.getloadavg()[0]:.1f}"
        whole = facts | {"question": arguments.question, "threads": torch.get_num_threads(), "load": load} | row
        out = Path(arguments.out)
        is_new = not out.exists()
        with out.open("a", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(whole)
        print(*(f"{key}={value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
