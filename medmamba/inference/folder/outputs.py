"""Where results go: names, and the lock that keeps a second run out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from medmamba.command import CommandError
from medmamba.files import try_lock
from medmamba.inference.check import Case
from medmamba.inference.writing import WRITABLE_SUFFIXES, suffix_of

from .report import report_name, reports_in

LOCK = ".medmamba.lock"
#: Suffixes that mean a file although we write none like it: not the name of a folder.
_OTHER_SUFFIXES = (".mhd", ".nhdr", ".hdr", ".img", ".gz", ".mgz", ".mgh", ".npy", ".npz", ".dcm", ".h5", ".zip")
_HEADERS_ALONE = {".mhd": ".mha", ".nhdr": ".nrrd"}


@dataclass(frozen=True)
class Outputs:
    """Names of everything that a run writes.

    Attributes:
        folder: exists once :meth:`prepare` ran.
        file: the one output, if a file was asked for and not a folder.
        file_format: suffix of all outputs; None takes that of the input.
        num_parts, part_id: which share of the cases this run has.
    """

    folder: Path
    file: Path | None
    file_format: str | None
    num_parts: int = 1
    part_id: int = 0

    @classmethod
    def of(cls, output: Path, file_format: str | None, num_parts: int, part_id: int) -> Outputs:
        """
        Raises:
            CommandError: wrong usage: see the texts.
        """
        wanted = None if file_format is None else suffix_of(f"x.{file_format.lstrip('.')}")
        if file_format is not None and wanted is None:
            raise CommandError(f"format {file_format!r} is not written; choose one of {', '.join(WRITABLE_SUFFIXES)}")
        if not 0 <= part_id < num_parts:
            raise CommandError(f"part {part_id} of {num_parts} does not exist; parts count from 0 to {num_parts - 1}")
        if output.is_dir():
            return cls(output, None, wanted, num_parts, part_id)
        suffix = suffix_of(output)
        if suffix is None:
            if output.name.lower().endswith(_OTHER_SUFFIXES) or output.is_file():
                raise CommandError(f"{output.name} is not written; end it with one of {', '.join(WRITABLE_SUFFIXES)}")
            return cls(output, None, wanted, num_parts, part_id)
        if wanted not in (None, suffix):
            raise CommandError(f"{output.name} is no {wanted}; leave the format out, or change one of them")
        if num_parts > 1:
            raise CommandError("parts of a run need an output folder, not a file")
        return cls(output.parent, output, suffix)

    @property
    def report(self) -> Path:
        if self.file is None:
            return self.folder / report_name(self.num_parts, self.part_id)
        suffix = suffix_of(self.file) or ""
        return self.folder / f"{self.file.name[: -len(suffix)]}.report.jsonl"

    def earlier_reports(self) -> list[Path]:
        """Reports of earlier runs that may know an output: any part's, because the parts may have changed."""
        if self.file is None:
            return reports_in(self.folder)
        return [self.report] if self.report.is_file() else []

    def path_of(self, case: Case) -> Path:
        if self.file is not None:
            return self.file
        return self.folder / f"{case.id}{self.file_format or _suffix_like(case)}"

    def preview_of(self, case: Case) -> Path:
        """Where its picture goes: a folder beside the results, or beside the one file."""
        if self.file is not None:
            return self.report.with_name(self.report.name.removesuffix(".report.jsonl") + ".preview.png")
        return self.folder / "preview" / f"{case.id}.png"

    def share_of(self, cases: list[Case]) -> list[Case]:
        """As nnU-Net divides: every ``num_parts``-th case."""
        return cases[self.part_id :: self.num_parts]

    def check(self, inputs: Path, cases: list[Case]) -> None:
        """Refuse to write over an input, or into the folder of the inputs.

        Raises:
            CommandError: and nothing was written.
        """
        if self.file is not None and len(cases) != 1:
            raise CommandError(f"{len(cases)} cases do not go into one file; name a folder for the output")
        if inputs.is_dir() and self.folder.resolve() == inputs.resolve():
            raise CommandError(
                f"{self.folder} holds the images; a run after this one would take results for images; "
                "choose another output folder"
            )
        sources = {path.resolve() for case in cases for path in case.files}
        for case in cases:
            if self.path_of(case).resolve() in sources:
                raise CommandError(f"{self.path_of(case)} is an image of this run; choose another output")

    def prepare(self) -> None:
        """
        Raises:
            CommandError: the folder cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            text = f"{self.folder} cannot be made ({error.strerror}); choose another output folder"
            raise CommandError(text) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out: of this report, and, but for parts beside each other, of this folder.

        Raises:
            CommandError: another run is writing here.
        """
        with ExitStack() as stack:
            if self.file is None:
                stack.enter_context(_lock(self.folder / LOCK, self.folder, shared=self.num_parts > 1))
            stack.enter_context(_lock(self.report, self.folder, shared=False))
            yield


def _suffix_like(case: Case) -> str:
    """NIfTI for a DICOM series."""
    name = case.files[0].name.lower()
    headers = (ours for theirs, ours in _HEADERS_ALONE.items() if name.endswith(theirs))
    return suffix_of(name) or next(headers, ".nii.gz")


@contextmanager
def _lock(path: Path, folder: Path, *, shared: bool) -> Iterator[None]:
    try:
        stream = path.open("ab")
    except OSError as error:
        raise CommandError(f"{folder} cannot be written ({error.strerror}); choose another output folder") from error
    with stream:
        if not try_lock(stream.fileno(), shared=shared):
            text = f"another run is writing {folder}; wait for its end or choose another output folder"
            raise CommandError(text)
        yield
