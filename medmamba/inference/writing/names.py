"""Label names within the file: Caret's XML in NIfTI header extensions, Slicer's words in NRRD and MetaImage.

The XML stands in the header twice. Connectome Workbench reads the extension with Caret's code, 30, and no other;
TotalSegmentator's ``load_multilabel_nifti`` reads the first, which it writes with code 0, and asks for it with a
method of nibabel (``get_content``) that version 5.4 refuses for code 30.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Mapping
from pathlib import Path
from xml.etree import ElementTree

#: Codes of the extensions, in their order: that of TotalSegmentator, and Caret's.
NAMES_ECODES = (0, 30)
_GOLDEN_RATIO = 0.618034


def names_as_xml(names: Mapping[int, str]) -> bytes:
    """A label table, UTF-8; the background is one of its rows."""
    extension = ElementTree.Element("CaretExtension")
    volume = ElementTree.SubElement(extension, "VolumeInformation", Index="0")
    table = ElementTree.SubElement(volume, "LabelTable")
    for value, name in sorted(names.items()):
        red, green, blue = (f"{part:.4f}" for part in _color(value))
        label = ElementTree.SubElement(
            table, "Label", Key=str(value), Red=red, Green=green, Blue=blue, Alpha="1" if value else "0"
        )
        label.text = name
    ElementTree.SubElement(volume, "VolumeType").text = "Label"
    return b'<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(extension, encoding="utf-8")


def names_as_fields(names: Mapping[int, str], shape: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    """Key and text per fact, as in Slicer's ``.seg.nrrd``; the background is no segment.

    Args:
        shape: (D, H, W).
    """
    extent = " ".join(f"0 {size - 1}" for size in reversed(shape))
    for k, value in enumerate(sorted(value for value in names if value)):
        yield f"Segment{k}_ID", f"Segment_{value}"
        yield f"Segment{k}_Name", names[value]
        yield f"Segment{k}_LabelValue", str(value)
        yield f"Segment{k}_Layer", "0"
        yield f"Segment{k}_Color", " ".join(f"{part:.4f}" for part in _color(value))
        yield f"Segment{k}_Extent", extent


def names_of(path: str | Path) -> dict[int, str]:
    """Label names of a NIfTI file, by value; empty when it holds none.

    Raises:
        OSError: the file cannot be read.
    """
    import nibabel

    for extension in nibabel.load(path).header.extensions:
        text = extension.content.strip(b"\0 ")
        if extension.get_code() in NAMES_ECODES and b"<LabelTable" in text:
            rows = ElementTree.fromstring(text).iter("Label")
            return {int(row.attrib["Key"]): row.text or "" for row in rows}
    return {}


def _color(value: int) -> tuple[float, float, float]:
    """Red, green, blue within 0 to 1, far apart for neighbouring values; black for the background."""
    return colorsys.hsv_to_rgb(value * _GOLDEN_RATIO % 1, 0.65, 0.95) if value else (0.0, 0.0, 0.0)
