"""The steps of the demo: plan, preprocess, train, predict, score, draw. nnU-Net does the first four.

Chosen for two CPU cores and a few minutes, and different from a real training: few iterations, batch 2, a small
variant, all training cases in one fold, no validation of whole volumes (the unseen volumes are scored instead).
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmamba.command import CommandError
from medmamba.demo.console import Console, Progress
from medmamba.demo.dataset import SHIPPED, Dataset, check_volumes, read_dataset
from medmamba.demo.folder import check_folder, claim_folder
from medmamba.demo.quiet import environment, output_to, without_child_processes
from medmamba.demo.settings import CONFIGURATION, Settings

if TYPE_CHECKING:
    from medmamba.demo.report import Scores
    from medmamba_plans.derive import Request

#: Mean Dice that the shipped volumes reach with the default settings; less means that something is broken.
EXPECTED_DICE = 0.75

_FOLD = "all"
_LOG, _REPORT, _PICTURE, _PREDICTIONS = "log.txt", "report.json", "demo.png", "predictions"

#: nnU-Net draws 1e8 intensities with replacement whatever the size of the dataset: 18 seconds on a CPU.
_FINGERPRINT_SAMPLES = 1e6

#: Memory that nnU-Net plans for. It keeps the patches of large volumes at about 64 cubed, for a CPU; the shipped
#: volumes are smaller than that and get the same patch as with nnU-Net's usual 8 GB.
_PLANNED_GB = 1.0


@dataclass(frozen=True)
class Result:
    """What came out.

    Attributes:
        scores: of the unseen volumes.
        is_as_expected: False when the shipped volumes with default settings (any seed) stay below
            ``EXPECTED_DICE``; other data and settings have no expectation.
        folder: everything the demo made.
    """

    scores: Scores
    is_as_expected: bool
    folder: Path

    @property
    def picture(self) -> Path:
        return self.folder / _PICTURE

    @property
    def report(self) -> Path:
        return self.folder / _REPORT


def run_demo(
    out: Path, data: Path | None = None, settings: Settings | None = None, console: Console | None = None
) -> Result:
    """Run the demo from raw volumes to the picture.

    Args:
        out: folder for everything; new, empty, or from an earlier run, whose files are replaced.
        data: nnU-Net raw layout; None takes the eight volumes of the package.
        settings: what to train and for how long.
        console: where lines and progress go.

    Raises:
        CommandError: wrong input (exit code 2), a step failed or the loss diverged (1), interrupted (130).
            Nothing is written or removed before the input has been checked.
    """
    settings, console = settings or Settings(), console or Console()
    request = settings.request()
    dataset = read_dataset(data)
    out = out.expanduser().resolve()
    if out == dataset.folder or out in dataset.folder.parents:
        raise CommandError(f"--data {dataset.folder} lies inside --out {out}; choose another --out")
    check_folder(out)
    check_volumes(dataset)
    run = _Run(dataset, settings, request, out, console)
    claim_folder(out, run.paths)
    return run.everything()


class _Run:
    """One run of the demo in its folder."""

    def __init__(self, dataset: Dataset, settings: Settings, request: Request, out: Path, console: Console) -> None:
        from medmamba.nnunet.names import trainer_name

        self.dataset, self.settings, self.request = dataset, settings, request
        self.out, self.console = out, console
        self.trainer_name = trainer_name(settings.network)
        model = f"{self.trainer_name}__{request.plans_name}__{CONFIGURATION}"
        self.raw = out / "nnUNet_raw" / dataset.name
        self.preprocessed = out / "nnUNet_preprocessed" / dataset.name
        self.model = out / "nnUNet_results" / dataset.name / model
        self.predictions = out / _PREDICTIONS
        self.log = out / _LOG
        self.seconds: dict[str, float] = {}

    @property
    def paths(self) -> list[str]:
        """What the run creates, relative to its folder."""
        folders = (self.raw, self.preprocessed, self.model, self.predictions)
        return [*(path.relative_to(self.out).as_posix() for path in folders), _PICTURE, _REPORT, _LOG]

    def everything(self) -> Result:
        variables = {
            "nnUNet_raw": str(self.raw.parent),
            "nnUNet_preprocessed": str(self.preprocessed.parent),
            "nnUNet_results": str(self.out / "nnUNet_results"),
            # The predictor takes its number of threads from here; there are no pools.
            "nnUNet_def_n_proc": str(os.cpu_count() or 1),
            # With 0 the planner would ask torch for 0 threads. Training takes 0: augmentation in this process.
            "nnUNet_n_proc_DA": "1",
            "nnUNet_wandb_enabled": "0",
        }
        self._say_input()
        with environment(variables):
            with self._step("copying the data"):
                self._copy()
            with self._step("planning and preprocessing"):
                patch = self._plan_and_preprocess()
            self._say_plan(patch)
            progress = self.console.progress("train", self.settings.total_iterations)
            with self._step("training", progress), environment({"nnUNet_n_proc_DA": "0"}), progress:
                self._train(progress)
            progress = self.console.progress("predict", len(self.dataset.unseen))
            with self._step("prediction", progress), progress:
                self._predict(progress)
        with self._step("scoring and drawing"):
            result = self._score_and_draw()
        self._say_result(result)
        return result

    def _say_input(self) -> None:
        training, unseen = self.dataset.training, self.dataset.unseen
        source = "shipped with medmamba, CC BY-SA 4.0" if self.dataset.is_shipped else str(self.dataset.folder)
        self.console.line(f"data     {self.dataset.name}: {source}")
        self.console.line(f"         {len(training)} volumes to train on; unseen: {' '.join(c.name for c in unseen)}")
        self.console.line(f"folder   {self.out}")

    def _say_plan(self, patch: list[int]) -> None:
        settings = self.settings
        self.console.line(
            f"network  {settings.network}, variant {settings.variant}; patch {'x'.join(map(str, patch))}, batch "
            f"{settings.batch_size}; {settings.total_iterations} iterations of {settings.optimizer}, "
            f"seed {settings.seed}"
        )

    def _say_result(self, result: Result) -> None:
        from medmamba.demo.report import TOLERANCE_MM

        self.console.line()
        self.console.line(f"Unseen volumes, NSD at {TOLERANCE_MM:g} mm:")
        for line in result.scores.table():
            self.console.line(line)
        self.console.line()
        mean = result.scores.mean
        self.console.line(f"mean Dice {mean.dice:.3f}, mean NSD {mean.nsd:.3f}")
        if not mean.dice > 0:
            self.console.line("No voxel of any structure was found: train longer (--iterations), or see the log")
        self.console.line(f"picture  {result.picture}")
        self.console.line(f"report   {result.report}")
        self.console.line(f"Everything is in {self.out}. Research use only, not a medical device.")

    @contextmanager
    def _step(self, name: str, progress: Progress | None = None) -> Iterator[None]:
        """Time a step, send its noise to the log, and turn whatever goes wrong into one line."""
        start = time.monotonic()
        try:
            with output_to(self.log):
                yield
        except CommandError:
            raise
        except KeyboardInterrupt:
            done = f" after {progress.done} of {progress.total} steps" if progress else ""
            raise CommandError(f"{name} was interrupted{done}; the same command starts again", 130) from None
        except Exception as error:
            with self.log.open("a", encoding="utf-8") as log:
                traceback.print_exc(file=log)
            raise _explained(name, error, self.log) from error
        finally:
            self.seconds[name] = round(time.monotonic() - start, 1)

    def _copy(self) -> None:
        """The dataset as nnU-Net wants it: training cases in imagesTr, unseen ones in imagesTs."""
        files = [path for case in self.dataset.cases for path in case.files]
        size, free = sum(path.stat().st_size for path in files), shutil.disk_usage(self.out).free
        # A copy, and as much again for each of preprocessed data and predictions.
        if 3 * size > free:
            raise CommandError(
                f"{self.out} has {free >> 20} MiB free and the demo needs {3 * size >> 20}; choose another --out"
            )
        for cases, images, labels in (
            (self.dataset.training, "imagesTr", "labelsTr"),
            (self.dataset.unseen, "imagesTs", "labelsTs"),
        ):
            for folder in (images, labels):
                (self.raw / folder).mkdir(parents=True)
            for case in cases:
                for image in case.images:
                    shutil.copyfile(image, self.raw / images / image.name)
                shutil.copyfile(case.label, self.raw / labels / case.label.name)
        description = {**self.dataset.description, "numTraining": len(self.dataset.training)}
        # A list of files would lead nnU-Net back to the source.
        description.pop("dataset", None)
        (self.raw / "dataset.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        if self.dataset.is_shipped:
            for name in ("LICENSE", "README.md"):
                shutil.copyfile(SHIPPED / name, self.raw / name)

    def _plan_and_preprocess(self) -> list[int]:
        """nnU-Net's fingerprint, plan and preprocessing with our architecture; returns the patch size."""
        from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import (
            DatasetFingerprintExtractor,
        )
        from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import (
            ExperimentPlanner,
        )
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        from medmamba.files import write_json
        from medmamba_plans.derive import derive_plans

        name = self.dataset.name
        with without_child_processes():
            extractor = DatasetFingerprintExtractor(name)
            extractor.num_foreground_voxels_for_intensitystats = _FINGERPRINT_SAMPLES
            extractor.run(overwrite_existing=True)
            planner = ExperimentPlanner(name, gpu_memory_target_in_gb=_PLANNED_GB)
            planner.plan_experiment()
            stock = _read_json(self.preprocessed / f"{planner.plans_identifier}.json")
            plans = derive_plans(stock, self.request)
            write_json(self.preprocessed / f"{self.request.plans_name}.json", plans)
            configuration = PlansManager(plans).get_configuration(CONFIGURATION)
            configuration.preprocessor_class(verbose=False).run(
                name, CONFIGURATION, self.request.plans_name, num_processes=1
            )
        # nnUNetv2_train compares its validation with these, should somebody go on with stock commands.
        shutil.copytree(self.raw / "labelsTr", self.preprocessed / "gt_segmentations")
        return [int(size) for size in configuration.patch_size]

    def _train(self, progress: Progress) -> None:
        import torch

        from medmamba.nnunet.trainers import TRAINERS

        plans = _read_json(self.preprocessed / f"{self.request.plans_name}.json")
        trainer = TRAINERS[self.trainer_name](
            {**plans, "continue_training": False},
            CONFIGURATION,
            _FOLD,  # type: ignore[arg-type]  # nnU-Net says int and means int or "all"
            _read_json(self.preprocessed / "dataset.json"),
            torch.device("cpu"),
        )
        trainer.seed = self.settings.seed
        trainer.rehearses, trainer.is_quiet = False, True  # the demo shows its own progress
        train_step = trainer.train_step

        def counted_step(batch: dict[str, Any]) -> dict[str, Any]:
            result = train_step(batch)
            progress.step(f"loss {float(result['loss']):.3f}")
            return result

        trainer.train_step = counted_step  # type: ignore[method-assign]
        trainer.run_training()

    def _predict(self, progress: Progress) -> None:
        import torch
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

        self.predictions.mkdir()
        predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(self.model), (_FOLD,), "checkpoint_final.pth")
        for case in self.dataset.unseen:
            images = [str(self.raw / "imagesTs" / image.name) for image in case.images]
            predictor.predict_from_files_sequential([images], [str(self.predictions / case.name)])
            progress.step(case.name)

    def _score_and_draw(self) -> Result:
        import torch

        from medmamba.demo.report import TOLERANCE_MM, draw_predictions, score_predictions
        from medmamba.files import write_json
        from medmamba_kernels.backends import choose_backend

        scores = score_predictions(self.dataset, self.predictions)
        draw_predictions(self.out / _PICTURE, self.dataset, self.predictions, scores)
        content = {
            "dataset": self.dataset.name,
            "trained_on": [case.name for case in self.dataset.training],
            "settings": {**asdict(self.settings), "iterations": self.settings.total_iterations},
            "nsd_tolerance_mm": TOLERANCE_MM,
            "scores": scores.to_json(),
            "seconds": self.seconds,
            "versions": {name: version(name) for name in ("medmamba", "nnunetv2", "torch")},
            "machine": {
                "python": platform.python_version(),
                "system": platform.platform(),
                "cpus": os.cpu_count(),
                "threads": torch.get_num_threads(),
                "scan_backend": choose_backend("auto", torch.device("cpu")),
            },
        }
        write_json(self.out / _REPORT, content)
        return Result(scores, self._is_as_expected(scores), self.out)

    def _is_as_expected(self, scores: Scores) -> bool:
        defaults = Settings(seed=self.settings.seed)
        if self.dataset.is_shipped and self.settings == defaults:
            return scores.mean.dice >= EXPECTED_DICE
        return True


def _explained(step: str, error: Exception, log: Path) -> CommandError:
    from medmamba.nnunet.errors import UserFacingError

    if isinstance(error, UserFacingError):
        return CommandError(str(error), 1)
    reason = (str(error).strip().splitlines() or ["no reason given"])[0]
    return CommandError(f"{step} failed ({type(error).__name__}: {reason}); details are in {log}", 1)


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))
