"""Which files of a folder belong to which case, by their names.

nnU-Net's names end in the number of a channel, ``CASE_0000.nii.gz``, ``CASE_0001.nii.gz``; a case of one channel may
leave it out. A number without a ``_0000`` beside it is part of the name: ``scan_2021.nii.gz``.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medmamba.inference.reading import READABLE_SUFFIXES

from .finding import Finding

_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")
_MOST_NAMES = 4
_DICOM_SUFFIXES = (".dcm", ".ima", ".dicom")


@dataclass(frozen=True)
class Case:
    """One thing to segment.

    Attributes:
        id: its name without channel and suffix; that of its segmentation.
        files: one per channel, in their order; a folder for a DICOM series.
        problem: why it cannot be read as it is; None when nothing is wrong with its names.
    """

    id: str
    files: tuple[Path, ...]
    problem: Finding | None = None


@dataclass(frozen=True)
class Found:
    """What a folder holds.

    Attributes:
        cases: sorted by id.
        ignored: names of what is no image, hidden files left out.
    """

    cases: tuple[Case, ...]
    ignored: tuple[str, ...]


def find_cases(path: Path, channels: int | Sequence[str] | None = None) -> Found:
    """The cases of a folder (not of the folders below it, but for DICOM series), or the one of a file.

    Args:
        channels: files per case, or the names of a model's channels; default: what most cases of the folder have.

    Raises:
        OSError: the folder cannot be read.
    """
    if not path.is_dir():
        return Found(tuple(_cases_of([path], channels) if _stem(path.name) else [Case(path.name, (path,))]), ())
    images: list[Path] = []
    series: list[Path] = []
    ignored: list[str] = []
    for entry in sorted(path.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and _is_dicom_folder(entry):
            series.append(entry)
        elif _stem(entry.name):
            images.append(entry)
        else:
            ignored.append(entry.name)
    if not images and not series and _is_dicom_folder(path):
        return Found((Case(path.resolve().name, (path,)),), ())
    cases = _cases_of(images, channels) + [Case(folder.name, (folder,)) for folder in series]
    cases = _without_clashes(cases)
    return Found(tuple(sorted(cases, key=lambda case: (case.id, case.files))), tuple(ignored))


def _cases_of(images: Sequence[Path], channels: int | Sequence[str] | None) -> list[Case]:
    """Group files by case; each suffix by itself, so that a case in two formats becomes two cases that clash."""
    groups: dict[tuple[str, str], dict[int, Path]] = defaultdict(dict)
    plain: list[Path] = []
    for path in images:
        stem = _stem(path.name)
        match = _CHANNEL.fullmatch(stem)
        if match:
            groups[match["case"], path.name[len(stem) :]][int(match["channel"])] = path
        else:
            plain.append(path)
    complete = [len(group) for group in groups.values() if 0 in group] + [1] * len(plain)
    names = () if channels is None or isinstance(channels, int) else tuple(channels)
    wanted = len(names) or (channels if isinstance(channels, int) else _most_common(complete))
    cases = [_with_channels(_stem(path.name), {0: path}, wanted, names) for path in plain]
    for (name, _), group in groups.items():
        if 0 in group or (wanted > 1 and max(group) < wanted):
            cases.append(_with_channels(name, group, wanted, names))
        else:
            cases += [_with_channels(_stem(path.name), {0: path}, wanted, names) for path in group.values()]
    return cases


def _most_common(counts: Iterable[int]) -> int:
    """The most frequent number, of several the largest; 1 without any."""
    counted = Counter(counts)
    return max(counted, key=lambda count: (counted[count], count)) if counted else 1


def _with_channels(name: str, group: Mapping[int, Path], wanted: int, names: Sequence[str]) -> Case:
    """A case; with a problem unless its channels are 0 to ``wanted``, which have ``names`` where these are known."""
    files = tuple(group[number] for number in sorted(group))
    if sorted(group) == list(range(wanted)):
        return Case(name, files)
    suffix = files[0].name[len(_stem(files[0].name)) :]
    expected = [f"{name}_{number:04}{suffix}" for number in range(wanted)]
    if names:
        expected = [f"{file} ({channel})" for file, channel in zip(expected, names, strict=True)]
    whose = " of the model" if names else ""
    text = (
        f"expected {wanted} channel {'file' if wanted == 1 else 'files'}{whose} ({_few(expected)}), found {len(files)} "
        f"({_few([path.name for path in files])}); add or remove files{'' if names else ', or say --channels N'}"
    )
    return Case(name, files, Finding.of("MM-IO-060", text))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_MOST_NAMES]) + ", ..." * (len(names) > _MOST_NAMES)


def _without_clashes(cases: Sequence[Case]) -> list[Case]:
    """Mark cases that would write the same segmentation, on file systems that ignore case as well."""
    by_name: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        by_name[unicodedata.normalize("NFC", case.id).casefold()].append(case)
    marked = []
    for case in cases:
        clashing = by_name[unicodedata.normalize("NFC", case.id).casefold()]
        if len(clashing) > 1:
            names = ", ".join(other.files[0].name for other in clashing)
            text = f"{len(clashing)} cases would have the name {case.id} ({names}); rename or remove all but one"
            case = replace(case, problem=Finding.of("MM-IO-062", text))
        marked.append(case)
    return marked


def _stem(name: str) -> str:
    """A name without the suffix of an image; empty when it has none, or nothing before it."""
    for suffix in sorted(READABLE_SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return ""


def _is_dicom_folder(folder: Path) -> bool:
    """Whether one of its files looks like DICOM; an unreadable folder counts, so that it is reported."""
    try:
        for path in sorted(folder.iterdir()):
            if path.is_file() and (path.suffix.lower() in _DICOM_SUFFIXES or _begins_as_dicom(path)):
                return True
    except OSError:
        return True
    return False


def _begins_as_dicom(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"
