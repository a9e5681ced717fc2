"""The run over a folder."""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from medmamba.command import CommandError
from medmamba.inference.channels import refuse_other_grids
from medmamba.inference.check import Case, find_cases
from medmamba.inference.protocol import Prediction, Predictor
from medmamba.inference.reading import READABLE_SUFFIXES, Image, ImageRefused, read_image
from medmamba.inference.writing import WriteFailed, write_segmentation
from medmamba.stop import EXIT_INTERRUPTED, Stopped, StopRequest

from .facts import command_without_folders, label_facts, machine, peak_ram_mb, versions
from .outputs import Outputs
from .problems import note, problem_of
from .progress import Progress, to_stdout
from .report import FORMAT, FORMAT_VERSION, Record, ReportWriter
from .resume import Earlier, inputs_of, remove_partial

_log = logging.getLogger(__name__)

#: Draws one case: path of the PNG, image, labels (D, H, W), names of the labels.
Preview = Callable[[Path, Image, NDArray[Any], Mapping[int, str]], None]


@dataclass(frozen=True)
class Options:
    """How a folder is run.

    Attributes:
        resume: keep outputs of earlier runs that verify; False does every case again.
        file_format: ".nii.gz", ".nii", ".mha" or ".nrrd"; None takes that of each input.
        num_parts, part_id: nnU-Net's words: this run has every ``num_parts``-th case from number ``part_id`` on.
        settings: what decides the labels besides the model (step size, mirroring, ...), as JSON can hold it: outputs
            of other settings are made again.
        command: the command line, for the report.
        read: reads one image.
        settle: takes the channels of a case as they were read and returns them as they are predicted, with notes, or
            raises ImageRefused; None: all lie on one grid, and nothing else is asked.
        preview: draws one case; None for no pictures. One that fails is a note and not a failure of the case.
        say: takes one line of progress.
    """

    resume: bool = True
    file_format: str | None = None
    num_parts: int = 1
    part_id: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    command: Sequence[str] = ()
    read: Callable[[Path], Image] = read_image
    settle: Callable[[Sequence[Image]], Sequence[Image]] | None = None
    preview: Preview | None = None
    say: Callable[[str], object] = to_stdout


def run_folder(inputs: str | Path, output: str | Path, predictor: Predictor, options: Options | None = None) -> int:
    """Segment a file or all cases of a folder, one after the other, and write a report beside the results.

    A case that cannot be read, predicted or written becomes a line of the report, and the next one follows. SIGTERM,
    SIGINT and SIGUSR1 end the run within the time that the predictor needs to notice; the current case is dropped.

    Args:
        inputs: a file or a folder; see :func:`medmamba.inference.check.find_cases`.
        output: a folder, or for one case a file with a suffix that is written.

    Returns:
        0 all done, 3 some cases refused or failed, 4 none done, 75 interrupted: the same call goes on.

    Raises:
        CommandError: wrong usage (exit code 2), the report cannot be written (1), the disk is full (75).
    """
    options = options or Options()
    inputs, output = Path(inputs), Path(output)
    outputs = Outputs.of(output, options.file_format, options.num_parts, options.part_id)
    found, ignored = _found(inputs, len(predictor.channel_names))
    outputs.check(inputs, found)
    cases = outputs.share_of(found)
    outputs.prepare()
    with StopRequest() as stop, outputs.locked():
        return _Run(inputs, outputs, predictor, options, stop).over(cases, ignored)


def _found(inputs: Path, channels: int) -> tuple[list[Case], list[str]]:
    """The cases, and the names of what is no image."""
    if not inputs.exists():
        raise CommandError(f"{inputs} does not exist; check the path")
    try:
        found = find_cases(inputs, channels)
    except OSError as error:
        raise CommandError(f"{inputs} cannot be read ({error.strerror}); check its rights") from error
    if not found.cases:
        raise CommandError(f"{inputs} holds no image; {', '.join(READABLE_SUFFIXES)} and DICOM series are read")
    return list(found.cases), list(found.ignored)


class _Run:
    """One run, for as long as the folder is locked."""

    def __init__(
        self, inputs: Path, outputs: Outputs, predictor: Predictor, options: Options, stop: StopRequest
    ) -> None:
        self._outputs, self._predictor, self._options, self._stop = outputs, predictor, options, stop
        self._settings = json.loads(json.dumps(dict(options.settings)))  # as a report gives it back: lists, text keys
        home = os.path.expanduser("~")  # noqa: PTH111 -- Path.home() fails for a user that the system does not know
        self._private = (inputs if inputs.is_dir() else inputs.parent, outputs.folder, Path(home))
        self._id = secrets.token_hex(6)
        self._versions = versions()
        self._earlier = Earlier(outputs)  # before anything is changed: it refuses what is no report
        self._report = ReportWriter(outputs.report)

    def over(self, cases: list[Case], ignored: list[str]) -> int:
        removed = remove_partial(self._outputs, cases)
        kept, todo = self._sort(cases)
        self._begin(cases, kept, removed, ignored)
        progress = Progress(len(todo), self._options.say)
        counts: Counter[str] = Counter(kept=len(kept))
        for case in todo:
            try:
                record = self._case(case)
            except Stopped:
                break
            counts[record["status"]] += 1
            progress.finished(record)
            if record["status"] == "failed" and record["error"]["code"] == "disk-full":
                text = f"the disk of {self._outputs.folder} is full; make room and start the same command again"
                raise CommandError(text, EXIT_INTERRUPTED)
        return self._end(counts, len(todo) - sum(counts.values()) + len(kept))

    def _sort(self, cases: list[Case]) -> tuple[list[Case], list[Case]]:
        """What is kept and what is to do: last, what a run died of, so that it stops nothing else."""
        kept: list[Case] = []
        if self._options.resume and not self._earlier.is_empty:
            self._options.say("checking the results of earlier runs")  # reads all files: minutes on a slow disk
        for case in cases:
            if self._stop.is_asked:
                break
            if self._options.resume and self._earlier.is_kept(case, self._predictor.id, self._settings):
                kept.append(case)
        ids = {case.id for case in kept}
        todo = [case for case in cases if case.id not in ids]
        return kept, sorted(todo, key=self._earlier.attempts)

    def _begin(self, cases: list[Case], kept: list[Case], removed: int, ignored: list[str]) -> None:
        parts = (self._options.num_parts, self._options.part_id)
        self._report.append(
            "run",
            format=FORMAT,
            version=FORMAT_VERSION,
            run=self._id,
            started=_now(),
            model=self._predictor.id,
            labels={str(value): name for value, name in self._predictor.labels.items()},
            settings=self._settings,
            versions=self._versions,
            command=command_without_folders(self._options.command),
            machine=machine(),
            part={"id": parts[1], "of": parts[0]} if parts[0] > 1 else None,
            cases=len(cases),
            kept=len(kept),
            partial_removed=removed,
            ignored=ignored,
        )
        found = f"{len(cases)} case{'s' * (len(cases) != 1)}"
        if kept or removed:
            found += f": {len(kept)} verified outputs kept, {removed} partial removed, {len(cases) - len(kept)} to do"
        self._options.say(found)
        if ignored:
            first = ", ".join(ignored[:5]) + (", ..." if len(ignored) > 5 else "")
            self._options.say(f"{len(ignored)} other things in the folder are not looked at: {first}")

    def _case(self, case: Case) -> Record:
        """Do one case and write its line.

        Raises:
            Stopped: no line was written.
            CommandError: no line can be written.
        """
        if self._stop.is_asked:
            raise Stopped
        self._report.append("begin", run=self._id, case=case.id)
        work = _Work(case, self._outputs, self._predictor, self._options, self._earlier, self._stop)
        started, clock = _now(), time.monotonic()
        try:
            content = work.done()
        except Stopped:
            raise
        except Exception as error:
            status, problem = problem_of(error, work.stage, self._private)
            _log.debug("%s", case.id, exc_info=error)
            content = {"status": status, "inputs": work.inputs, "notes": work.notes, "error": problem}
        return self._report.append(
            "case",
            run=self._id,
            case=case.id,
            model=self._predictor.id,
            settings=self._settings,
            medmamba=self._versions["medmamba"],
            started=started,
            finished=_now(),
            seconds=round(time.monotonic() - clock, 3),
            stage_seconds=work.seconds,
            peak_ram_mb=peak_ram_mb(),
            **content,
        )

    def _end(self, counts: Counter[str], left: int) -> int:
        ended_well = counts["done"] + counts["kept"]
        ended_badly = counts["refused"] + counts["failed"]
        if left:
            exit_code = EXIT_INTERRUPTED
        elif not ended_badly:
            exit_code = 0
        else:
            exit_code = 3 if ended_well else 4
        names = ("done", "kept", "refused", "failed")
        self._report.append(
            "end",
            run=self._id,
            finished=_now(),
            exit_code=exit_code,
            left=left,
            **{name: counts[name] for name in names},
        )
        said = ", ".join(f"{counts[name]} {name}" for name in names if counts[name] or name == "done")
        if left:
            said += f", {left} left; stopped as asked, start the same command again to go on"
        self._options.say(f"{said}. Report: {self._outputs.report.name}")
        return exit_code


class _Work:
    """One case, from its files to its output.

    Attributes:
        stage: where it is: "reading", "predicting" or "writing".
        seconds: time spent per stage, in seconds.
        inputs: name, hash and size of the files, as soon as they are known.
        notes: what was odd, as soon as it is known.
    """

    def __init__(
        self,
        case: Case,
        outputs: Outputs,
        predictor: Predictor,
        options: Options,
        earlier: Earlier,
        stop: StopRequest,
    ) -> None:
        self._case, self._predictor, self._options = case, predictor, options
        self._path, self._preview = outputs.path_of(case), outputs.preview_of(case)
        self._earlier, self._stop = earlier, stop
        self._clock = time.monotonic()
        self.stage = "reading"
        self.seconds: dict[str, float] = {}
        self.inputs: list[dict[str, Any]] = []
        self.notes: list[Mapping[str, str]] = []

    def done(self) -> dict[str, Any]:
        """Read, predict, write.

        Returns:
            The fields of the report that only a case that is done has.

        Raises:
            Stopped: nothing was written.
            Exception: what went wrong, in ``stage``.
        """
        channels = self._channels()
        self._enter("predicting")
        prediction = self._prediction(channels)
        image = channels[0]
        facts = label_facts(prediction.labels, image, self._predictor.labels)
        self._enter("writing")
        if self._path.is_file() and not self._earlier.knows(self._case, self._path):
            self.notes.append(note("MM-RN-020", "a file of this name that no report knows was replaced"))
        digest = write_segmentation(self._path, prediction.labels, image, self._predictor.labels)
        self._draw(image, prediction.labels)
        self._enter("")
        output = {
            "file": self._path.name,
            "sha256": digest,
            "bytes": self._path.stat().st_size,
            "shape_xyz": list(image.values.shape[::-1]),
            "spacing_mm_xyz": [round(value, 6) for value in image.spacing_mm[::-1]],
        }
        return {
            "status": "done",
            "inputs": self.inputs,
            "output": output,
            "notes": self.notes,
            "facts": dict(prediction.facts),
            **facts,
        }

    def _draw(self, image: Image, labels: NDArray[Any]) -> None:
        if self._options.preview is None:
            return
        try:
            self._options.preview(self._preview, image, labels, self._predictor.labels)
        except Exception as error:  # the segmentation is there, and that is what counts
            _log.debug("%s", self._case.id, exc_info=error)
            self.notes.append(note("MM-RN-022", f"no preview was drawn ({type(error).__name__})"))

    def _enter(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[self.stage] = round(now - self._clock, 3)
        if self._stop.is_asked and stage:
            raise Stopped
        self._clock = now
        if stage:
            self.stage = stage

    def _channels(self) -> list[Image]:
        attempts = self._earlier.attempts(self._case)
        if attempts:
            text = f"{attempts} earlier run(s) ended without a word while at this case; it was kept for the end"
            self.notes.append(note("MM-RN-021", text))
        problem = self._case.problem
        if problem is not None:
            raise ImageRefused(problem.code, problem.text, problem.id)
        before = _states(self._case.files)
        self.inputs = inputs_of(self._case)
        channels = [self._options.read(path) for path in self._case.files]
        if _states(self._case.files) != before:
            raise ImageRefused("changing", "a file changed while it was read; wait until it is complete", "MM-RN-004")
        before_reading = list(self.notes)
        self.notes += _notes_of(channels)
        if self._options.settle is None:
            refuse_other_grids(channels)
            return channels
        settled = list(self._options.settle(channels))
        self.notes = before_reading + _notes_of(settled)
        return settled

    def _prediction(self, channels: list[Image]) -> Prediction:
        prediction = self._predictor.predict(channels, should_stop=lambda: self._stop.is_asked)
        if prediction.labels.shape != channels[0].values.shape:
            text = f"labels are {prediction.labels.shape}, the image is {channels[0].values.shape}"
            raise WriteFailed("labels", text)
        try:
            json.dumps(dict(prediction.facts), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise WriteFailed("labels", f"the facts of the predictor are no plain values ({error})") from error
        return prediction


def _states(paths: Sequence[Path]) -> list[tuple[int, int]]:
    states = [path.stat() for path in paths]
    return [(state.st_size, state.st_mtime_ns) for state in states]


def _now() -> str:
    """UTC, to the microsecond: lines of one case are compared by it."""
    return datetime.now(UTC).isoformat()


def _notes_of(channels: Sequence[Image]) -> list[Mapping[str, str]]:
    return [{"id": item.id, "text": item.text} for image in channels for item in image.notes]
