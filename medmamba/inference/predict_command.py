"""``medmamba predict -m MODEL``: the command line of prediction with a model package."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from medmamba.command import Command, CommandError
from medmamba.inference.presets import PRESETS
from medmamba.stop import EXIT_INTERRUPTED, StopRequest

#: As medmamba.inference.writing has them; importing that loads numpy.
_WRITTEN = (".nii.gz", ".nii", ".mha", ".nrrd")


def _configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-m", "--model", type=Path, required=True, metavar="MODEL", help="folder that `medmamba export` wrote")
    add(
        "-i", "--input", type=Path, required=True, metavar="INPUT", help="image, DICOM series, or folder of them; "
        "several channels as CASE_0000, CASE_0001, ..."
    )  # fmt: skip
    add("-o", "--output", type=Path, required=True, metavar="OUTPUT", help="folder, or a file for one image")
    add("--format", choices=_WRITTEN, help="of the segmentations; default: that of each image")
    add("-f", "--fold", nargs="+", default=[], metavar="FOLD", help="folds to average; default: all of the model")
    add("--preset", choices=list(PRESETS), default="accurate", help="accurate (default, as nnU-Net), balanced or fast")
    add("-step_size", "--step", type=_step, metavar="SHARE", help="of the window; default: the preset's")
    add("--disable_tta", "--no-mirroring", action="store_true", help="do not average over reflections: faster")
    add(
        "--mask-air", action="store_true", help="leave padding and the air around the patient out of the scans; only "
        "for models that were trained so"
    )  # fmt: skip
    add("--max-ram", type=_gigabytes, metavar="GB", help="this process may hold; default: what there is")
    add("-device", "--device", default="auto", help="cpu, cuda, cuda:1, ...; default: cuda where there is one")
    add("--restart", action="store_true", help="do every case again; default: keep results that verify")
    add("--no-preview", action="store_true", help="write no preview/CASE.png")
    add("-num_parts", "--num-parts", type=int, default=1, metavar="N", help="divide the cases among N runs")
    add("-part_id", "--part-id", type=int, default=0, metavar="K", help="the share of this run, from 0")
    add("--volume", type=int, metavar="N", help="of files with several volumes, from 0")
    add(
        "--prefer", choices=["sform", "qform"], default="sform", metavar="FORM", help="sform (default) or qform: "
        "which one counts where both are set"
    )  # fmt: skip
    add("--force", action="store_true", help="take values that no scanner gives, with a note")


def _run(arguments: argparse.Namespace) -> int:
    # Signals count from here on: loading takes seconds, in which the first process of a container would ignore them.
    with StopRequest() as stop:
        from medmamba.inference.folder import Options, run_folder
        from medmamba.inference.model import ModelRefused, load_model
        from medmamba.inference.predictor import ModelPredictor
        from medmamba.inference.preview import write_preview
        from medmamba.inference.reading import read_image
        from medmamba.inference.settle import settle

        device = _device(arguments.device)
        try:
            model = load_model(arguments.model)
            preset = PRESETS[arguments.preset]
            predictor = ModelPredictor(
                model,
                tuple(arguments.fold),
                device,
                step=preset.step if arguments.step is None else arguments.step,
                mirrors=preset.mirrors and not arguments.disable_tta,
                skips_air=preset.skips_air,
                masks_air=arguments.mask_air,
                max_ram_gb=arguments.max_ram,
            )
            predictor.prepare()
        except ModelRefused as error:
            raise CommandError(str(error)) from error
        if stop.is_asked:
            return EXIT_INTERRUPTED
        taken = {name: getattr(arguments, name) for name in ("volume", "prefer", "force")}
        options = Options(
            resume=not arguments.restart,
            file_format=arguments.format,
            num_parts=arguments.num_parts,
            part_id=arguments.part_id,
            settings=predictor.settings | taken,
            command=("medmamba", *sys.argv[1:]),
            read=partial(read_image, volume=arguments.volume, prefer=arguments.prefer),
            settle=partial(settle, model, force=arguments.force),
            preview=None if arguments.no_preview else write_preview,
        )
        options.say(f"{model.name}, folds {', '.join(predictor.folds_used)}, on {device}; {model.id[:12]}")
        return run_folder(arguments.input, arguments.output, predictor, options)


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise CommandError(f"--device {name} cannot be used ({reason}); say --device cpu") from error
    return name


def _gigabytes(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError("must be above 0")
    return number


def _step(text: str) -> float:
    step = float(text)
    if not 0 < step <= 1:
        raise argparse.ArgumentTypeError("must be above 0 and at most 1")
    return step


PREDICT = Command(help="segment images with a model package", configure=_configure, run=_run)
