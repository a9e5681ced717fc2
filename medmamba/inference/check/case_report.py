"""All about one case that can be known without a network. One channel is in memory at a time."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medmamba.inference.orientation import axis_codes
from medmamba.inference.reading import Image, read_image
from medmamba.inference.reading.content import Policy, settled
from medmamba.inference.reading.geometry import corners_apart

from .cases import Case
from .cost import Cost
from .finding import Finding

_SAMPLES_PER_AXIS = 100
#: Images lie on one grid when no corner is farther apart than this share of a voxel.
SAME_GRID = 0.5


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Attributes:
        policy: which values are taken; one for all channels, or one for each.
        volume: of files with several.
        prefer: which form of a NIfTI counts where both are set.
    """

    policy: Policy | Sequence[Policy] = field(default_factory=Policy)
    volume: int | None = None
    prefer: Literal["sform", "qform"] = "sform"

    def policy_of(self, channel: int) -> Policy:
        """Of a channel, counted from 0."""
        return self.policy if isinstance(self.policy, Policy) else self.policy[channel]


@dataclass(frozen=True)
class ChannelFacts:
    """Values of one channel.

    Attributes:
        file: its name.
        content: SHA-256 of dtype, shape and voxels; equal where a file was copied, in whatever format.
        dtype: of the voxels after the file's own rescaling, e.g. "int16".
        low, high: of all voxels.
        percentiles: 0.5, 50 and 99.5, of a regular subset of the voxels.
    """

    file: str
    content: str
    dtype: str
    low: float
    high: float
    percentiles: tuple[float, float, float]


@dataclass(frozen=True)
class CaseReport:
    """What is known about one case.

    Attributes:
        case: its id.
        files: names, in the order of the channels.
        findings: refusals and notes.
        shape: (D, H, W) of the file's grid; empty, like all below, when the first channel cannot be read.
        spacing_mm: along D, H, W.
        extent_mm: field of view along D, H, W.
        affine: rows of (4, 4); voxel (x, y, z) to mm along right, anterior, superior.
        axes: where x, y, z of the file point to, e.g. "LPS".
        channels: those that could be read.
        seconds: what looking at it took.
        cost: what predicting it takes; None where no model was given.
    """

    case: str
    files: tuple[str, ...]
    findings: tuple[Finding, ...] = ()
    shape: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    extent_mm: tuple[float, ...] = ()
    affine: tuple[tuple[float, ...], ...] = ()
    axes: str = ""
    channels: tuple[ChannelFacts, ...] = ()
    seconds: float = 0.0
    cost: Cost | None = None

    @property
    def status(self) -> str:
        """ "refused", "noted" or "ok"."""
        if any(finding.refuses for finding in self.findings):
            return "refused"
        return "noted" if self.findings else "ok"


#: A check that needs more than the case: it gets the report so far and returns what it finds. Checks against a model
#: (fingerprint, number of channels, size of the patch, time and memory) are functions of this kind.
Check = Callable[[CaseReport], Iterable[Finding]]


def examine(case: Case | Path, reading: Reading | None = None, checks: Sequence[Check] = ()) -> CaseReport:
    """Read all channels of one case and describe them. No error of an image or of reading it is raised.

    Args:
        case: or the path of its only file.
        reading: default ``Reading()``.
        checks: further ones, run in their order on cases that nothing has refused before.
    """
    case = Case(case.name, (case,)) if isinstance(case, Path) else case
    start = time.monotonic()
    if case.problem is not None:
        return replace(_empty(case), findings=(case.problem,))
    reading = reading or Reading()
    report = _of_channels(case, (_examined(path, reading, number) for number, path in enumerate(case.files)))
    for check in checks:
        if report.status != "refused":
            report = replace(report, findings=report.findings + tuple(check(report)))
    return replace(report, seconds=round(time.monotonic() - start, 3))


def describe(case: Case, images: Sequence[Image]) -> CaseReport:
    """The report of a case whose channels are in memory, for checks; its notes are those of the images."""
    named = zip(images, (path.name for path in case.files), strict=True)
    return _of_channels(case, (_described(image, name) for image, name in named))


def _empty(case: Case) -> CaseReport:
    return CaseReport(case.id, tuple(path.name for path in case.files))


def _of_channels(case: Case, channels: Iterable[_Channel]) -> CaseReport:
    """One report from channels that are looked at one after the other."""
    report = _empty(case)
    place: _Place | None = None
    for channel in channels:
        report = replace(report, findings=report.findings + channel.findings)
        if channel.facts is None or channel.place is None:
            continue
        report = replace(report, channels=(*report.channels, channel.facts))
        if place is None:
            place = channel.place
            report = _with_place(report, place)
        else:
            report = replace(report, findings=report.findings + _other_grid(place, channel.place, channel.facts.file))
    return report


@dataclass(frozen=True)
class _Place:
    shape: tuple[int, ...]
    affine: NDArray[np.float64]
    spacing_mm: tuple[float, ...]


@dataclass(frozen=True)
class _Channel:
    findings: tuple[Finding, ...]
    facts: ChannelFacts | None = None
    place: _Place | None = None


def _examined(path: Path, reading: Reading, number: int) -> _Channel:
    """One file; all that can go wrong with it becomes a finding."""
    try:
        image = read_image(path, volume=reading.volume, prefer=reading.prefer)
        return _described(settled(image, reading.policy_of(number)), path.name)
    except Exception as error:
        return _Channel((Finding.of_error(error, path.name),))


def _described(image: Image, name: str) -> _Channel:
    notes = tuple(Finding.of_note(note, name) for note in image.notes)
    return _Channel(notes, _facts_of(image, name), _Place(image.values.shape, image.affine, image.spacing_mm))


def _facts_of(image: Image, name: str) -> ChannelFacts:
    values: NDArray[Any] = image.values
    sample = values[tuple(slice(None, None, max(1, size // _SAMPLES_PER_AXIS)) for size in values.shape)]
    low, middle, high = (float(value) for value in np.percentile(sample, [0.5, 50, 99.5]))
    extremes = float(values.min()), float(values.max())
    return ChannelFacts(name, _content_hash(values), str(values.dtype), *extremes, (low, middle, high))


def _content_hash(values: NDArray[Any]) -> str:
    digest = hashlib.sha256(f"{values.dtype.str.lstrip('<>=|')} {values.shape}".encode())
    for plane in values:
        digest.update(np.ascontiguousarray(plane, plane.dtype.newbyteorder("<")).data)
    return digest.hexdigest()


def _with_place(report: CaseReport, place: _Place) -> CaseReport:
    return replace(
        report,
        shape=place.shape,
        spacing_mm=tuple(round(size, 6) for size in place.spacing_mm),
        extent_mm=tuple(round(size * step, 3) for size, step in zip(place.shape, place.spacing_mm, strict=True)),
        affine=tuple(tuple(float(value) for value in row) for row in place.affine),
        axes=axis_codes(place.affine),
    )


def _other_grid(first: _Place, other: _Place, name: str) -> tuple[Finding, ...]:
    if other.shape != first.shape:
        text = f"{_times(other.shape)} voxels, the first channel has {_times(first.shape)}; resample to one grid"
        return (Finding.of("MM-IO-061", text, name),)
    apart = corners_apart(first.affine, other.affine, first.shape[::-1])
    if apart <= SAME_GRID * min(first.spacing_mm):
        return ()
    text = f"a corner lies {apart:.3g} mm from that of the first channel; resample to one grid"
    return (Finding.of("MM-IO-061", text, name),)


def _times(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))
