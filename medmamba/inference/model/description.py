"""model.json: what a package says about its model, as plain values, and the check of all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import Any

from .fingerprint import check_fingerprint
from .labels import Labels, channel_names, read_labels
from .metrics import check_metrics
from .package import MODEL, is_fold
from .plans import ORIENTATIONS, check_plans, orientation_of
from .problems import ModelRefused, shown
from .rounding import PRECISIONS, PRECISIONS_OF_FORMAT_1
from .scan_input import check_scan_input
from .values import items, mapping, one_of, optional, parse_json, text, whole, wrong

#: Written is the least that can say what is to be said, so that readers of format 1 read what they can.
FORMAT_VERSION = 2
#: Not in format 1.
_NEW_IN_2 = "scan_input"
#: Always part of the intended use, whatever else an author says.
RESEARCH_USE = "Research use only, not a medical device."
#: Keys of dataset.json that a package keeps; others may name cases.
DATASET_KEPT = (
    "name",
    "description",
    "reference",
    "licence",
    "license",
    "release",
    "channel_names",
    "modality",
    "labels",
    "regions_class_order",
    "numTraining",
    "file_ending",
    "overwrite_image_reader_writer",
)


@dataclass(frozen=True)
class Description:
    """Content of a model.json, checked. All values are plain JSON.

    Attributes:
        name: of the model, for reports.
        created: when it was exported, ISO 8601 in UTC.
        configuration: name of the configuration in the plans.
        plans: of nnU-Net with this configuration alone, resolved.
        dataset: dataset.json without lists of cases.
        fingerprint: of the training images; None if unknown. See :func:`.fingerprint.reduce_fingerprint`.
        orientation: "SAR": images are turned to superior, anterior, right; "file": they are taken as they lie.
        inference_allowed_mirroring_axes: axes of the network's input that may be mirrored; None for none.
        trainer: class that trained it.
        checkpoint: file of nnU-Net that was exported.
        epochs: fold -> epochs of training; the keys are the folds of the package.
        precision: of the stored weights.
        versions: of the software that exported it, and of medmamba in training if that is known.
        licence: of the weights; None if nobody stated one.
        intended_use: what the authors made it for; says that it is for research.
        metrics: of the validation; None if unknown. See :func:`.metrics.reduce_metrics`.
        citation: what to cite.
        scan_input: limits of what the scans read; None for none. See :func:`.scan_input.check_scan_input`.

    Raises:
        ModelRefused: MM-MD-009, MM-MD-010, MM-MD-011.
    """

    name: str
    created: str
    configuration: str
    plans: dict[str, Any]
    dataset: dict[str, Any]
    fingerprint: dict[str, Any] | None
    orientation: str
    inference_allowed_mirroring_axes: list[int] | None
    trainer: str
    checkpoint: str
    epochs: dict[str, int]
    precision: str
    versions: dict[str, str]
    licence: str | None
    intended_use: str
    metrics: dict[str, Any] | None
    citation: list[str]
    scan_input: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("name", "configuration", "trainer", "checkpoint", "intended_use"):
            text(getattr(self, name), name)
        _date(self.created, "created")
        optional(self.licence, "licence", text)
        one_of(self.precision, "precision", PRECISIONS)
        items(self.citation, "citation", text)
        for software, version in mapping(self.versions, "versions").items():
            text(version, f"versions.{software}")
        self._check_folds()
        if RESEARCH_USE not in self.intended_use:
            wrong("intended_use", self.intended_use, f"a text with {RESEARCH_USE!r}")
        surplus = [key for key in mapping(self.dataset, "dataset") if key not in DATASET_KEPT]
        if surplus:
            wrong("dataset", surplus, f"nothing besides {', '.join(DATASET_KEPT)}")
        read_labels(self.dataset)
        check_plans(self.plans, self.configuration, len(channel_names(self.dataset)))
        if self.orientation != orientation_of(self.plans):
            wrong("orientation", self.orientation, f"{orientation_of(self.plans)}, as the reader of the plans has it")
        check_fingerprint(self.fingerprint)
        check_metrics(self.metrics)
        check_scan_input(self.scan_input, self.folds)
        self._check_mirroring()

    @property
    def folds(self) -> tuple[str, ...]:
        return tuple(self.epochs)

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration of the plans."""
        settings: dict[str, Any] = self.plans["configurations"][self.configuration]
        return settings

    @property
    def labels(self) -> Labels:
        return read_labels(self.dataset)

    @property
    def input_channels(self) -> int:
        return len(channel_names(self.dataset))

    def to_bytes(self) -> bytes:
        """Content of model.json; the order of keys is kept, as that of the labels decides about the outputs."""
        content = {"format": self._format, **asdict(self)}
        if self._format == 1:
            del content[_NEW_IN_2]
        return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")

    @classmethod
    def from_bytes(cls, content: bytes) -> Description:
        """The description of a model.json.

        Raises:
            ModelRefused: MM-MD-007 to MM-MD-011.
        """
        given = parse_json(content, MODEL)
        known = tuple(field.name for field in fields(cls))
        version = given.get("format") if isinstance(given, Mapping) else None
        if isinstance(version, int) and not isinstance(version, bool) and version > FORMAT_VERSION:
            raise ModelRefused(
                "MM-MD-008",
                f"model.json has format {shown(version)}, and this version of medmamba reads {FORMAT_VERSION}; install "
                "the version that exported the model, or a newer one",
            )
        if version == 1:
            known = tuple(name for name in known if name != _NEW_IN_2)
        mapping(given, "model.json", ("format", *known))
        whole(version, "format", 1, FORMAT_VERSION)
        description = cls(**{name: given[name] for name in known})
        if version != description._format:
            wrong(
                "precision", description.precision, f"{' or '.join(PRECISIONS_OF_FORMAT_1)} in format 1 and only there"
            )
        return description

    @property
    def _format(self) -> int:
        return 1 if self.precision in PRECISIONS_OF_FORMAT_1 and self.scan_input is None else 2

    def _check_folds(self) -> None:
        for fold, epochs in mapping(self.epochs, "epochs").items():
            if not is_fold(fold):
                wrong("epochs", fold, "folds: 0, 1, ... or all")
            whole(epochs, f"epochs.{fold}")
        if not self.epochs:
            wrong("epochs", self.epochs, "at least one fold")

    def _check_mirroring(self) -> None:
        ndim = len(self.settings["patch_size"])
        axes = optional(
            self.inference_allowed_mirroring_axes, "inference_allowed_mirroring_axes", lambda v, at: items(v, at, whole)
        )
        if axes is not None and (len(set(axes)) != len(axes) or max(axes, default=0) >= ndim):
            wrong("inference_allowed_mirroring_axes", axes, f"different axes below {ndim}")


def _date(value: object, where: str) -> None:
    try:
        datetime.fromisoformat(text(value, where))
    except ValueError as error:
        if isinstance(error, ModelRefused):
            raise
        wrong(where, value, "a date and time, as 2026-01-31T12:00:00+00:00")


__all__ = ["DATASET_KEPT", "FORMAT_VERSION", "ORIENTATIONS", "PRECISIONS", "RESEARCH_USE", "Description"]
