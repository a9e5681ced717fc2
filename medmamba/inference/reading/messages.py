"""Every refusal and every note about images, by its id: what it means and what to do.

An id never changes its meaning and is never used again; a message that is no longer given stays away from the list.
``docs/reference/messages.md`` is made of this file.
"""

from __future__ import annotations

from dataclasses import dataclass

from .image import ImageRefused, Note


@dataclass(frozen=True)
class Message:
    """One entry of the catalogue.

    Attributes:
        code: short name, shared by messages of one kind; the manifests of corpora hold it.
        meaning: what was found.
        remedy: what its user can do.
        refuses: False for a note: the image is used.
    """

    code: str
    meaning: str
    remedy: str
    refuses: bool = True


def _note(code: str, meaning: str, remedy: str) -> Message:
    return Message(code, meaning, remedy, refuses=False)


_AGAIN = "copy or download the file again"
_CONVERT = "convert it to `.nii.gz`"

MESSAGES: dict[str, Message] = {
    # The file.
    "MM-IO-001": Message(
        "not-opened", "missing, a link to nothing, no permission, or an error of the disk", "check path and rights"
    ),
    "MM-IO-002": Message("format", "a pipe, a socket or a device, not a file", "give the path of a file"),
    "MM-IO-003": Message("empty", "a file of 0 bytes", _AGAIN),
    "MM-IO-004": Message("truncated", "fewer bytes than its header or its compression announces", _AGAIN),
    "MM-IO-005": Message("checksum", "changed bytes: decompression fails, or its checksum differs", _AGAIN),
    "MM-IO-006": Message("oversized", "decompresses to more than its header can mean", "write the image anew"),
    "MM-IO-007": Message("format", "the name ends in no suffix that is read", _CONVERT),
    "MM-IO-008": Message("format", "the content is not what the name says", f"rename it, or {_CONVERT}"),
    "MM-IO-009": Message("format", "a header that cannot be followed: axes, type, encoding or offset", _CONVERT),
    "MM-IO-010": Message("format", "a NIfTI header without its data (`.hdr` and `.img`)", _CONVERT),
    "MM-IO-011": Message("missing-data", "the data file that the header names is not beside it", "copy both files"),
    "MM-IO-012": Message("unreadable", "SimpleITK fails on it for another reason", _CONVERT),
    "MM-IO-013": Message("name", "a path that is not UTF-8, which SimpleITK cannot open", "rename it"),
    # What it holds.
    "MM-IO-020": Message("voxel-type", "colours or vectors", "convert to one scalar channel"),
    "MM-IO-021": Message("voxel-type", "complex numbers", "save magnitude or phase"),
    "MM-IO-022": Message("voxel-type", "a type of more than 64 bits, or an unknown one", "convert to int16 or float32"),
    "MM-IO-023": Message(
        "not-3d", "several volumes in one file", "choose one with `--volume N` (from 0), or split the file"
    ),
    "MM-IO-024": Message("not-3d", "five or more axes", "split it into 3D files"),
    "MM-IO-025": Message("not-3d", "a slice or a line", "give the whole volume"),
    "MM-IO-026": Message(
        "not-3d", "`--volume` names a volume that is not there", "choose a number that the text lists"
    ),
    # Where it lies.
    "MM-IO-030": Message(
        "geometry", "no position: NaN, an axis without length, or axes in one plane", "write the header anew"
    ),
    "MM-IO-031": Message("geometry", "only the qform is set, and its quaternion is none", "write the header anew"),
    # DICOM.
    "MM-IO-040": Message("format", "a folder without a DICOM image", "give a file, or the folder of one series"),
    "MM-IO-041": Message("several-series", "several DICOM series in one folder", "give each a folder of its own"),
    "MM-IO-042": Message("not-3d", "fewer than two slices that are no localizer", "give the whole series"),
    "MM-IO-043": Message("missing-slice", "a hole between slices", "fetch the missing slices"),
    "MM-IO-044": Message("doubled-slice", "two slices at one place", "remove the copy"),
    "MM-IO-045": Message("uneven-slices", "slices at uneven distances", "resample them evenly"),
    "MM-IO-046": Message("damaged-slice", "a file of the series cannot be read", "copy the series again"),
    "MM-IO-047": Message("geometry", "slices without position or with different orientations", "export it again"),
    # Values, for prediction.
    "MM-IO-050": Message("not-finite", "more than 1 % of the voxels are NaN or infinite", "replace them"),
    "MM-IO-051": Message(
        "range",
        "values that no scanner gives: a CT outside -32768 to 65535, another image beyond 2^31",
        "correct them, or take them as they are with `--force`",
    ),
    "MM-IO-052": Message("range", "values beyond float32", "rescale them"),
    # Cases of a folder.
    "MM-IO-060": Message(
        "channels", "not the channel files that were expected", "add or remove files as the text says"
    ),
    "MM-IO-061": Message("channel-geometry", "channels of one case on different grids", "resample them to one grid"),
    "MM-IO-062": Message(
        "duplicate-id", "two files for one case, or names that differ in upper and lower case only", "rename one"
    ),
    "MM-IO-063": Message("memory", "not enough memory to read it", "use a machine or a container with more memory"),
    "MM-IO-064": Message("internal", "a bug", "report it with the text"),
    "MM-IO-065": Message("no-label", "a case without a label map", "add the label map or remove the image"),
    "MM-IO-066": Message(
        "label-geometry",
        "a label map on another grid than its image",
        "resample it; where it only lies elsewhere, look at both, then correct it or say `--allow-shift`",
    ),
    "MM-IO-067": Message("label-values", "a label map with other values than 0, 1, 2, ... 65535", "save classes"),
    # Notes: the image is used.
    "MM-IO-070": _note("suffix", "compressed although its name says otherwise, or the reverse", "rename it"),
    "MM-IO-071": _note("trailing", "bytes after the end of the data", "see that the header has the right axes"),
    "MM-IO-072": _note("axes", "further axes of length 1 were dropped", "nothing"),
    "MM-IO-073": _note(
        "rescaling", "`scl_slope` is 0 or not finite: nothing was rescaled", "nothing, unless it is a CT"
    ),
    "MM-IO-074": _note("rescaling", "`scl_inter` is not finite and was read as 0", "see that intensities are right"),
    "MM-IO-075": _note("geometry", "`pixdim` and the sform differ in spacing; the sform counts", "correct the header"),
    "MM-IO-076": _note("geometry", "`pixdim` is 0 or not finite; the sform counts", "correct the header"),
    "MM-IO-077": _note(
        "geometry", "a negative spacing (`pixdim`, `ElementSpacing`); its absolute value counts", "correct the header"
    ),
    "MM-IO-078": _note(
        "geometry",
        "qform and sform place a corner more than half a voxel apart; the sform counts",
        "look at the result; `--prefer qform` takes the other",
    ),
    "MM-IO-079": _note("geometry", "the quaternion of the qform is none; the sform counts", "correct the header"),
    "MM-IO-080": _note(
        "orientation",
        "the file does not say how it lies; taken as right, anterior, superior (NIfTI) or left, posterior, superior",
        "see that left and right are where they belong",
    ),
    "MM-IO-081": _note("units", "lengths in metres or micrometres, converted to mm", "nothing"),
    "MM-IO-082": _note("units", "the unit of length is implausible; taken as mm", "correct the header"),
    "MM-IO-083": _note(
        "sheared", "axes not at right angles: a tilted gantry", "judge the result; it lies on the grid of the file"
    ),
    "MM-IO-084": _note("geometry", "`pixdim[0]` is neither 1 nor -1; taken as 1", "correct the header"),
    "MM-IO-085": _note("axes", "one of several volumes was taken, as asked", "nothing"),
    "MM-IO-086": _note("thin", "fewer than 8 voxels along an axis", "expect little of the result"),
    "MM-IO-087": _note("not-finite", "NaN or infinite voxels, replaced by the smallest value", "look at the result"),
    "MM-IO-088": _note("no-content", "all voxels have one value", "see that the right file was given"),
    "MM-IO-089": _note("range", "values that no scanner gives, taken because of `--force`", "look at the result"),
    "MM-IO-090": _note("duplicate-content", "the same voxels as in another case", "see that no file was mixed up"),
    "MM-IO-091": _note(
        "extent", "less than 10 mm or more than 3 m across", "see that the header has the right unit and spacing"
    ),
    "MM-IO-092": _note("label-shift", "a label map lies elsewhere, as `--allow-shift` allows", "look at both"),
    "MM-IO-093": _note("empty-label", "a label map of background only", "see that it is right"),
}


def refused(identifier: str, text: str) -> ImageRefused:
    """A refusal of the catalogue, to raise; ``text`` as in :class:`ImageRefused`."""
    return ImageRefused(MESSAGES[identifier].code, text, identifier)


def noted(identifier: str, text: str) -> Note:
    """A note of the catalogue; ``text`` is one sentence with the numbers."""
    if MESSAGES[identifier].refuses:
        raise ValueError(f"{identifier} is a refusal, not a note")
    return Note(identifier, text)
