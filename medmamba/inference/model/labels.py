"""What the outputs of a network mean, read from dataset.json as nnU-Net's LabelManager reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .values import entry, items, mapping, text, whole, wrong

#: Segmentations are written as uint8 or uint16.
LARGEST_LABEL = 2**16 - 1


@dataclass(frozen=True)
class Labels:
    """Labels of a dataset.

    Attributes:
        names: value in a segmentation -> name, background included. With regions, a value is that of the last region
            in the order of nnU-Net that a voxel lies in, and has the name of this region.
        num_heads: outputs of the network: one per label, or one per region.
        regions: with regions, the labels of every output, else None.
        region_values: with regions, the value that every output paints, in the order of painting; else None.
        ignore: value of unlabelled voxels in the training data, which no segmentation has; None without.
    """

    names: Mapping[int, str]
    num_heads: int
    regions: tuple[tuple[int, ...], ...] | None
    region_values: tuple[int, ...] | None
    ignore: int | None


def read_labels(dataset_json: Mapping[str, Any]) -> Labels:
    """Labels of a dataset.json.

    Raises:
        ModelRefused: MM-MD-009: labels that nnU-Net could not train with.
    """
    where = "dataset.labels"
    given = {text(name, where): _values(value, f"{where}.{name}") for name, value in _given(dataset_json).items()}
    ignore = given.pop("ignore", None)
    if given.get("background") != 0:
        wrong(f"{where}.background", given.get("background"), "0")
    known = sorted({label for value in given.values() for label in _tuple(value)})
    if ignore is not None and ignore != known[-1] + 1:
        wrong(f"{where}.ignore", ignore, f"the number after the last label, {known[-1] + 1}")
    ignored = ignore if isinstance(ignore, int) else None
    if not any(isinstance(value, tuple) and len(value) > 1 for value in given.values()):
        return _plain(given, known, ignored)
    regions = {name: _tuple(value) for name, value in given.items() if set(_tuple(value)) != {0}}
    order = entry(dict(dataset_json), "regions_class_order", "dataset")
    values = items(order, "dataset.regions_class_order", _label, length=len(regions))
    names = {0: "background"}
    for name, value in zip(regions, values, strict=True):
        names[value] = name
    return Labels(names, len(regions), tuple(regions.values()), tuple(values), ignored)


def channel_names(dataset_json: Mapping[str, Any]) -> list[str]:
    """Names of the image channels, in the order of the network's input.

    Raises:
        ModelRefused: MM-MD-009.
    """
    key = "modality" if "modality" in dataset_json else "channel_names"
    where = f"dataset.{key}"
    given = mapping(entry(dict(dataset_json), key, "dataset"), where)
    if not given:
        wrong(where, given, "at least one channel")
    for number in range(len(given)):
        entry(given, str(number), where)
    return [text(given[str(number)], f"{where}.{number}") for number in range(len(given))]


def _given(dataset_json: Mapping[str, Any]) -> dict[str, Any]:
    return mapping(entry(dict(dataset_json), "labels", "dataset"), "dataset.labels")


def _plain(given: Mapping[str, int | tuple[int, ...]], known: list[int], ignore: int | None) -> Labels:
    # The number of an output is the value in the segmentation.
    if known != list(range(len(known))):
        wrong("dataset.labels", known, "numbers that follow each other from 0 on")
    if len(known) != len(given):
        wrong("dataset.labels", sorted(given), "one name for every label")
    names = {_tuple(value)[0]: name for name, value in given.items()}
    return Labels({label: names[label] for label in known}, len(known), None, None, ignore)


def _values(value: object, where: str) -> int | tuple[int, ...]:
    if not isinstance(value, list):
        return _label(value, where)
    if not value:
        wrong(where, value, "at least one label")
    return tuple(items(value, where, _label))


def _tuple(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def _label(value: object, where: str) -> int:
    return whole(value, where, 0, LARGEST_LABEL)
