"""How far a case lies from the images that a model was trained on: notes, never refusals.

Limits are factors on the range of all training images, along each axis by itself. nnU-Net's fingerprint has sizes after
its crop to what is not 0, and intensities of labelled voxels only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from medmamba.inference.orientation import orientation_of
from medmamba.inference.reading.content import Policy

from .case_report import CaseReport, ChannelFacts, Check
from .finding import Finding

if TYPE_CHECKING:
    from medmamba.inference.model import Model

#: A spacing is usual up to this factor beyond those of training.
SPACING_FACTOR = 1.5
#: A field of view is usual from this share of the smallest of training, or of a tile of the network ...
LEAST_SHARE = 0.5
#: ... up to this factor on the largest: training sizes are those after a crop.
MOST_EXTENT = 2.0
#: Share of the intensities of labelled voxels that an image has to cover.
LEAST_COVERED = 0.1

_AXIS_NAMES = {"SAR": ("foot to head", "back to front", "left to right"), "file": ("along z", "along y", "along x")}
#: Normalisations under which a constant or a factor on all voxels changes what the network sees.
_ABSOLUTE = ("CTNormalization", "NoNormalization")
_OFFSET_HU = 1024


def model_checks(model: Model) -> list[Check]:
    """Checks of a case against the training images of a model, for :func:`.case_report.examine`.

    Without a fingerprint in the package only its tiles and channels are left to compare with.
    """
    axes = Axes(model.orientation)
    training = model.fingerprint
    checks: list[Check] = [ExtentCheck(axes, _tile_mm(model), _ranges(training, "extent_mm"))]
    spacings = _ranges(training, "spacing_mm")
    if spacings is not None:
        checks.append(SpacingCheck(axes, spacings))
    return [*checks, IntensityCheck(_bands(model, training)), HuCheck(are_cts(model))]


def are_cts(model: Model) -> list[bool]:
    """For each channel of a model, whether it holds HU, as nnU-Net decides: by name or by normalisation."""
    schemes = model.configuration["normalization_schemes"]
    return [
        name.casefold() == "ct" or scheme == "CTNormalization"
        for name, scheme in zip(model.channel_names, schemes, strict=True)
    ]


def policies(model: Model, *, is_ct: bool = False, force: bool = False) -> list[Policy]:
    """What each channel of a model may hold; ``is_ct`` says that all are CTs."""
    return [Policy(is_ct=is_ct or one, force=force) for one in are_cts(model)]


@dataclass(frozen=True)
class Axes:
    """The axes of the arrays that a model was trained on.

    Attributes:
        orientation: "SAR" or "file"; see ``Model.orientation``.
    """

    orientation: str

    @property
    def names(self) -> tuple[str, ...]:
        return _AXIS_NAMES[self.orientation]

    def turned(self, report: CaseReport, values: Sequence[float]) -> list[float]:
        """Values of a case along D, H, W of its file, along the axes of the model."""
        if self.orientation == "file":
            return list(values)
        return [values[axis] for axis in orientation_of(report.shape, np.array(report.affine)).axes]


Range = tuple[float, float]


@dataclass(frozen=True)
class SpacingCheck:
    """Whether the network was trained on such spacings.

    Attributes:
        axes: of the model.
        training: smallest and largest along each, in mm.
    """

    axes: Axes
    training: Sequence[Range]

    def __call__(self, report: CaseReport) -> Iterable[Finding]:
        spacings = self.axes.turned(report, report.spacing_mm)
        odd = [
            f"{mm:.3g} mm {name} (in training {_span(limits)})"
            for name, mm, limits in zip(self.axes.names, spacings, self.training, strict=True)
            if not limits[0] / SPACING_FACTOR <= mm <= limits[1] * SPACING_FACTOR
        ]
        if odd:
            yield Finding.of("MM-CK-001", f"voxels of {', '.join(odd)}")


@dataclass(frozen=True)
class ExtentCheck:
    """Whether the network was trained on such fields of view.

    Attributes:
        axes: of the model.
        tile_mm: of the network along each; 0 where it sees one plane.
        training: smallest and largest field of view along each, in mm; None if unknown.
    """

    axes: Axes
    tile_mm: Sequence[float]
    training: Sequence[Range] | None

    def __call__(self, report: CaseReport) -> Iterable[Finding]:
        extents = self.axes.turned(report, report.extent_mm)
        small, large = [], []
        for axis, (name, mm) in enumerate(zip(self.axes.names, extents, strict=True)):
            low, high = self._limits(axis)
            known = f", in training {_span(self.training[axis])}" if self.training else ""
            tile = f"a tile of the network covers {self.tile_mm[axis]:.3g} mm"
            if mm < low:
                small.append(
                    f"{mm:.3g} mm {name} ({tile}{known})" if self.tile_mm[axis] else f"{mm:.3g} mm {name}{known}"
                )
            elif mm > high:
                large.append(f"{mm:.3g} mm {name}{known}")
        if small:
            yield Finding.of("MM-CK-002", f"it covers only {'; '.join(small)}")
        if large:
            yield Finding.of("MM-CK-003", f"it covers {'; '.join(large)}")

    def _limits(self, axis: int) -> Range:
        tile = LEAST_SHARE * self.tile_mm[axis]
        if self.training is None:
            return tile, np.inf
        smallest, largest = self.training[axis]
        # A network may be trained on images that are smaller than its tile.
        return max(LEAST_SHARE * smallest, min(tile, smallest)), MOST_EXTENT * largest


@dataclass(frozen=True)
class IntensityCheck:
    """Whether values are on the scale of the training images, where the network sees this scale.

    Attributes:
        bands: for each channel, percentiles 0.5 and 99.5 of its labelled voxels in training; None where a
            normalisation by the image's own mean or range makes the scale meaningless, or nothing is known.
    """

    bands: Sequence[Range | None]

    def __call__(self, report: CaseReport) -> Iterable[Finding]:
        for channel, band in zip(report.channels, self.bands, strict=False):
            if band is not None and channel.low < channel.high and _covered(channel, band) < LEAST_COVERED:
                low, middle, high = channel.percentiles
                text = (
                    f"99 % of its voxels have {low:.4g} to {high:.4g} (median {middle:.4g}), labelled ones in training "
                    f"{_span(band, unit='')}"
                )
                yield Finding.of("MM-CK-004", text, channel.file)


@dataclass(frozen=True)
class HuCheck:
    """Whether a CT looks like one in HU.

    Attributes:
        are_cts: for each channel.
    """

    are_cts: Sequence[bool]

    def __call__(self, report: CaseReport) -> Iterable[Finding]:
        for channel, is_ct in zip(report.channels, self.are_cts, strict=False):
            if is_ct and 0 <= channel.low < channel.high:
                shifted = channel.percentiles[2] >= _OFFSET_HU
                guess = f"{_OFFSET_HU} seems to be added" if shifted else "it seems to be cut to a window"
                text = f"no value below 0 ({channel.low:g} to {channel.high:g}), though air has -1000 HU: {guess}"
                yield Finding.of("MM-CK-005", text, channel.file)


def _covered(channel: ChannelFacts, band: Range) -> float:
    """Share of a band that lies within percentiles 0.5 to 99.5 of a channel."""
    low, _, high = channel.percentiles
    if band[0] == band[1]:
        return float(low <= band[0] <= high)
    return max(0.0, min(high, band[1]) - max(low, band[0])) / (band[1] - band[0])


def _tile_mm(model: Model) -> list[float]:
    """Size of a tile along the axes of the model's arrays."""
    settings, order = model.configuration, model.plans["transpose_forward"]
    sizes = [size * mm for size, mm in zip(settings["patch_size"], settings["spacing"], strict=True)]
    along = dict(zip(order, [0.0] * (3 - len(sizes)) + sizes, strict=True))
    return [along[axis] for axis in range(3)]


def _ranges(training: dict[str, Any] | None, name: str) -> list[Range] | None:
    """Smallest and largest of the training images, along each axis."""
    return None if training is None else list(zip(training[name][0], training[name][-1], strict=True))


def _bands(model: Model, training: dict[str, Any] | None) -> list[Range | None]:
    schemes = model.configuration["normalization_schemes"]
    known = {} if training is None else training["intensities"]
    return [_band(known.get(str(k), {})) if scheme in _ABSOLUTE else None for k, scheme in enumerate(schemes)]


def _band(intensities: dict[str, float | None]) -> Range | None:
    low, high = intensities.get("percentile_00_5"), intensities.get("percentile_99_5")
    return None if low is None or high is None else (low, high)


def _span(limits: Range, unit: str = " mm") -> str:
    low, high = (f"{value:.4g}" for value in limits)
    return f"{low}{unit}" if low == high else f"{low} to {high}{unit}"
