"""What an encoder file says about its encoder: enough to build it again and to feed it as in pretraining."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from medmamba.networks import get_spec
from medmamba.networks.unet import check_divisible, total_strides

from .errors import WeightsError

MODALITIES = ("ct", "mr")
#: Scheme of nnU-Net -> the constants that it needs beside its name.
NORMALISATIONS: Mapping[str, tuple[str, ...]] = {
    "CTNormalization": ("low", "high", "mean", "std"),
    "ZScoreNormalization": (),
}
#: Arguments of ``create_network`` that belong to the dataset or the trainer, not to the encoder.
_NOT_ARGUMENTS = ("input_channels", "num_classes", "deep_supervision")
_DIRECTIONS = ("SI", "AP", "RL")


@dataclass(frozen=True)
class EncoderDescription:
    """An encoder: how to build it, what it was fed with, and where it comes from. All values are plain JSON.

    Attributes:
        network: registry name.
        arguments: of ``create_network``: strides, widths, ...; all but input channels, classes and deep supervision.
        input_channels: image channels.
        patch_size: D, H, W voxels of the crops.
        spacing_mm: D, H, W.
        axes: where the axes of the arrays point to, e.g. "SAR": superior, anterior, right.
        reader: reader of nnU-Net that gives arrays with these axes.
        modality: "ct" or "mr".
        normalisation: ``{"scheme": "CTNormalization", "low", "high", "mean", "std"}`` in HU, for
            ``(clip(hu, low, high) - mean) / std``; or ``{"scheme": "ZScoreNormalization"}``, per volume.
        corpus: "hash" (hexadecimal) and number of "volumes", and what else is known.
        training: objective, steps, seed, ...
        citation: what to cite, one text each.
        version: of medmamba.

    Raises:
        WeightsError: a value of the wrong type, or values that contradict each other.
    """

    network: str
    arguments: Mapping[str, Any]
    input_channels: int
    patch_size: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    axes: str
    reader: str
    modality: str
    normalisation: Mapping[str, Any]
    corpus: Mapping[str, Any]
    training: Mapping[str, Any]
    citation: tuple[str, ...]
    version: str

    def __post_init__(self) -> None:
        for name in ("arguments", "normalisation", "corpus", "training"):
            object.__setattr__(self, name, _plain(name, getattr(self, name)))
        for name, kind in (("patch_size", _is_count), ("spacing_mm", _is_size), ("citation", _is_text)):
            object.__setattr__(self, name, _tuple(name, getattr(self, name), kind))
        for name in ("network", "axes", "reader", "modality", "version"):
            _require(_is_text(getattr(self, name)), name, getattr(self, name), "a text")
        _require(_is_count(self.input_channels), "input_channels", self.input_channels, "a whole number of 1 or more")
        _require(self.modality in MODALITIES, "modality", self.modality, " or ".join(MODALITIES))
        self._check_network()
        self._check_axes()
        self._check_normalisation()
        _require(_is_text(self.corpus.get("hash")), "corpus", self.corpus, "a hash and a number of volumes")
        _require(_is_count(self.corpus.get("volumes")), "corpus", self.corpus, "a hash and a number of volumes")

    def to_json(self) -> dict[str, Any]:
        """All values as JSON has them: mappings and lists."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_json(cls, content: object) -> EncoderDescription:
        """The description of :meth:`to_json`.

        Raises:
            WeightsError: something is missing, unknown, or of the wrong type.
        """
        known = [field.name for field in fields(cls)]
        given = content if isinstance(content, Mapping) else {}
        wrong = [f"no {name}" for name in known if name not in given]
        wrong += [f"an unknown {name}" for name in given if name not in known]
        if wrong:
            raise WeightsError(f"the description of the encoder has {', '.join(wrong)}; write the file again")
        return cls(**given)

    def _check_network(self) -> None:
        try:
            get_spec(self.network)
        except KeyError as error:
            raise WeightsError(f"{error.args[0]}; install the version of medmamba that wrote the encoder") from error
        surplus = [name for name in _NOT_ARGUMENTS if name in self.arguments]
        if surplus:
            raise WeightsError(f"arguments of an encoder hold {', '.join(surplus)}, which the dataset decides")
        strides: Any = self.arguments.get("strides")
        is_good = _is_list(strides) and all(_is_list(stage) and all(map(_is_count, stage)) for stage in strides)
        _require(is_good, "arguments.strides", strides, "a list of whole numbers for every stage")
        try:
            check_divisible(self.patch_size, total_strides(strides)[-1])
        except ValueError as error:
            raise WeightsError(f"patch size and strides of the encoder do not fit: {error}") from error

    def _check_axes(self) -> None:
        ndim = len(self.patch_size)
        sizes = f"{ndim} numbers, as patch_size has"
        _require(len(self.spacing_mm) == ndim, "spacing_mm", self.spacing_mm, sizes)
        along = {pair for pair in _DIRECTIONS for letter in self.axes if letter in pair}
        is_good = len(self.axes) == len(along) == ndim
        _require(
            is_good, "axes", self.axes, f"{ndim} letters of different axes, one of each of {', '.join(_DIRECTIONS)}"
        )

    def _check_normalisation(self) -> None:
        scheme, constants = self.normalisation.get("scheme"), dict(self.normalisation)
        known = NORMALISATIONS.get(scheme) if isinstance(scheme, str) else None
        constants.pop("scheme", None)
        is_good = known is not None and sorted(constants) == sorted(known) and all(map(_is_number, constants.values()))
        if is_good and constants:
            is_good = constants["low"] < constants["high"] and constants["std"] > 0
        expected = "CTNormalization with numbers low < high, mean and std > 0, or ZScoreNormalization alone"
        _require(is_good, "normalisation", self.normalisation, expected)


def _plain(name: str, value: object) -> dict[str, Any]:
    """``value`` as it comes back from JSON."""
    try:
        plain = json.loads(json.dumps(dict(value), allow_nan=False)) if isinstance(value, Mapping) else None
    except (TypeError, ValueError, RecursionError):
        plain = None
    if plain is None:
        raise WeightsError(f"{name} of an encoder is {_short(value)}; expected a mapping of plain JSON values")
    return plain


def _tuple(name: str, values: object, kind: Callable[[object], bool]) -> tuple[Any, ...]:
    is_good = isinstance(values, Sequence) and not isinstance(values, str | bytes) and all(map(kind, values))
    _require(is_good, name, values, _KINDS[kind])
    return tuple(values)  # type: ignore[arg-type]


def _require(is_good: bool, name: str, value: object, expected: str) -> None:
    if not is_good:
        raise WeightsError(f"{name} of an encoder is {_short(value)}; expected {expected}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_list(value: object) -> bool:
    return isinstance(value, list) and bool(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_size(value: object) -> bool:
    return _is_number(value) and value > 0  # type: ignore[operator]


_KINDS: Mapping[Callable[[object], bool], str] = {
    _is_count: "whole numbers of 1 or more",
    _is_size: "numbers above 0",
    _is_text: "texts",
}
