"""What a pretraining does, as data: a TOML file of one's own, or one of those that come along."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from medmamba.command import CommandError

#: In the checkout and in an installation.
RECIPES = Path(__file__).parent / "recipes"

#: The window of MambaMIM, [-175, 250] HU to [0, 1]; see ``Recipe.normalisation``.
_WINDOW = {"low": -175.0, "high": 250.0, "mean": -175.0, "std": 425.0}
_PRECISIONS = ("auto", "float32", "bfloat16", "float64")
_TABLES = ("arguments", "normalisation")


@dataclass(frozen=True)
class Recipe:
    """Everything that a pretraining depends on, but the corpus and the machine.

    Attributes:
        network: name in ``medmamba.networks.NETWORKS``.
        patch_size: of the crops, D, H, W voxels; a multiple of the network's total stride.
        arguments: of the network; ``strides`` must be among them.
        variant: one of the network's argument sets, below ``arguments``, or "".
        modality: of the corpus, "ct" or "mr".
        spacing_mm: of the corpus, D, H, W; empty: any.
        normalisation: of CT, in HU: ``(clip(x, low, high) - mean) / std``. MR is normalised to mean 0 and standard
            deviation 1 per volume and takes none.
        weights: how often a volume is read: "volume", "patient" or "voxels", as in :class:`.corpus.crops.CropReader`.
        flips: probability of a reflection along D, H, W.
        objective: name in ``medmamba_pretrain.objectives.OBJECTIVES``.
        fill: name in ``medmamba_pretrain.fill.FILLS``, or "" for that of the objective.
        fill_routes: routes along which the fill, or the objective "autoregressive", reads the units.
        fill_ends: of fills that interpolate, "hold" or "learned".
        mask_ratio: share of masked units, in (0, 1).
        horizon: of the objective "autoregressive": share of the units that are predicted.
        decoder_share: widths of the decoder over those of the encoder.
        decoder_finest: first scale that the decoder works at; what is finer is predicted from there.
        steps: optimizer steps.
        batch_size: crops per step, over all processes.
        lr: learning rate of AdamW after the warm-up.
        lr_end: learning rate at the end of the cosine, over ``lr``.
        warmup_steps: steps of linear rise.
        weight_decay: for weights; the parameters of scans, norms and biases have none.
        betas: of AdamW.
        clip_norm: largest norm of the gradients.
        precision: "float32", "bfloat16" (autocast), "auto" (bfloat16 on GPUs that have it) or "float64", which is slow
            and leaves no rounding to argue about.
        seed: of weights, crops and masks.
        validation_patients: patients kept out of training for the validation; 0: none, and no validation.
        validate_every: steps between two validations.
        save_every: steps between two checkpoints.
        max_substituted: share of crops that may come from another volume because the drawn one is damaged.

    Raises:
        CommandError: a value of another type, out of range, or unknown.
    """

    network: str
    patch_size: tuple[int, ...]
    arguments: Mapping[str, Any]
    variant: str = ""
    modality: str = "ct"
    spacing_mm: tuple[float, ...] = ()
    normalisation: Mapping[str, float] = field(default_factory=dict)
    weights: str = "volume"
    flips: tuple[float, ...] = (0.2, 0.2, 0.1)
    objective: str = "mambamim"
    fill: str = ""
    fill_routes: tuple[str, ...] = ("dhw",)
    fill_ends: str = "hold"
    mask_ratio: float = 0.75
    horizon: float = 0.1
    decoder_share: float = 0.5
    decoder_finest: int = 0
    steps: int = 10_000
    batch_size: int = 8
    lr: float = 1e-4
    lr_end: float = 1e-3
    warmup_steps: int = 0
    weight_decay: float = 0.05
    betas: tuple[float, ...] = (0.9, 0.95)
    clip_norm: float = 5.0
    precision: str = "auto"
    seed: int = 0
    validation_patients: int = 2
    validate_every: int = 500
    save_every: int = 500
    max_substituted: float = 0.05

    def __post_init__(self) -> None:
        if self.modality == "ct":
            object.__setattr__(self, "normalisation", {**_WINDOW, **self.normalisation})
        self._check_names()
        self._check_numbers()

    def _check_names(self) -> None:
        from .fill import FILLS
        from .objectives import OBJECTIVES

        known = {
            "modality": ("ct", "mr"),
            "weights": ("volume", "patient", "voxels"),
            "objective": tuple(OBJECTIVES),
            "fill": ("", *FILLS),
            "fill_ends": ("hold", "learned"),
            "precision": _PRECISIONS,
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise CommandError(
                    f"recipe: no {name} {getattr(self, name)!r}; known: {', '.join(value for value in values if value)}"
                )
        if "strides" not in self.arguments:
            raise CommandError(
                "recipe: arguments.strides is missing, the stride of every stage per axis, e.g. "
                "[[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]"
            )
        surplus = sorted(self.normalisation.keys() - (_WINDOW.keys() if self.modality == "ct" else set()))
        if surplus:
            raise CommandError(
                f"recipe: normalisation of {self.modality} takes no {', '.join(surplus)}; CT takes low, high, mean and "
                "std, MR nothing"
            )

    def _check_numbers(self) -> None:
        for name in ("steps", "batch_size", "validate_every", "save_every"):
            self._require(name, getattr(self, name) >= 1, "1 or more")
        for name in ("decoder_finest", "validation_patients", "weight_decay", "seed"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        for name in ("lr", "clip_norm", "decoder_share"):
            self._require(name, 0 < getattr(self, name) < math.inf, "a number above 0")
        for name in ("mask_ratio", "horizon"):
            self._require(name, 0 < getattr(self, name) < 1, "between 0 and 1")
        for name in ("lr_end", "max_substituted"):
            self._require(name, 0 <= getattr(self, name) <= 1, "from 0 to 1")
        self._require("warmup_steps", 0 <= self.warmup_steps < self.steps, f"below steps = {self.steps}")
        self._require("patch_size", all(size >= 1 for size in self.patch_size), "1 or more along every axis")
        axes = len(self.patch_size)
        self._require("flips", len(self.flips) == axes, f"one probability for each of the {axes} axes of the patch")
        self._require("flips", all(0 <= p <= 1 for p in self.flips), "from 0 to 1")
        self._require("spacing_mm", len(self.spacing_mm) in (0, axes), "empty, or one number per axis of the patch")
        self._require("betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)")
        if self.modality == "ct":
            window = self.normalisation
            self._require("normalisation", window["low"] < window["high"] and window["std"] > 0, "low < high, std > 0")

    def _require(self, name: str, is_good: bool, expected: str) -> None:
        if not is_good:
            raise CommandError(f"recipe: {name} is {getattr(self, name)!r}; expected {expected}")

    @property
    def network_arguments(self) -> dict[str, Any]:
        """All arguments of the network but channels and classes: its defaults, the variant and ``arguments``.

        Raises:
            CommandError: an unknown network or variant.
        """
        from medmamba.networks import get_spec

        try:
            spec = get_spec(self.network)
        except KeyError as error:
            raise CommandError(f"recipe: {error.args[0]}") from error
        if self.variant and self.variant not in spec.presets:
            raise CommandError(
                f"recipe: network {self.network} has no variant {self.variant!r}; known: {', '.join(spec.presets)}"
            )
        return {**spec.defaults, **(spec.presets[self.variant] if self.variant else {}), **self.arguments}

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Recipe:
        """A recipe from plain values, as TOML and JSON have them.

        Raises:
            CommandError: an unknown or missing name, or a value that is not of its type.
        """
        known = {entry.name for entry in fields(cls)}
        unknown = sorted(content.keys() - known)
        if unknown:
            raise CommandError(f"recipe: unknown entry {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        missing = [name for name in ("network", "patch_size", "arguments") if name not in content]
        if missing:
            raise CommandError(f"recipe: {', '.join(missing)} is missing")
        types = get_type_hints(cls)
        return cls(**{name: _typed(name, value, types[name]) for name, value in content.items()})


def read_recipe(name_or_path: str, changes: Iterable[str] = ()) -> Recipe:
    """A recipe by the name of one that comes along, or from a TOML file.

    Args:
        name_or_path: e.g. "ct-small", or a path that ends with ``.toml``.
        changes: ``NAME=VALUE``, the value as in TOML or else a string; ``arguments.NAME=VALUE`` for an argument of
            the network.

    Raises:
        CommandError: there is no such recipe or file, or it has an entry that is wrong.
    """
    path = Path(name_or_path) if name_or_path.endswith(".toml") else RECIPES / f"{name_or_path}.toml"
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.toml")))
        raise CommandError(f"there is no recipe {name_or_path}; known: {known}, or give a .toml file") from None
    except (OSError, ValueError) as error:
        raise CommandError(f"{path} cannot be read as TOML ({error}); correct it") from error
    for change in changes:
        _change(content, change)
    return Recipe.from_dict(content)


def _change(content: dict[str, Any], change: str) -> None:
    name, equals, text = change.partition("=")
    table, dot, entry = name.partition(".")
    if not equals or (dot and table not in _TABLES):
        raise CommandError(f"--set {change} is not NAME=VALUE, e.g. --set steps=1000 or --set arguments.d_state=8")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    if dot:
        content.setdefault(table, {})[entry] = value
    else:
        content[name] = value


def _typed(name: str, value: Any, wanted: Any) -> Any:
    """A value of TOML as the type of its field; a whole number may stand for a float, a single value for a list."""
    text = str(wanted)
    if text.startswith("tuple"):
        item = float if "float" in text else int if "int" in text else str
        values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        return tuple(_typed(name, entry, item) for entry in values)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if wanted is float and is_number:
        return float(value)
    if wanted is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if wanted is str and isinstance(value, str):
        return value
    if "Mapping" in text and isinstance(value, Mapping):
        if "float" in text:
            return {str(key): _typed(f"{name}.{key}", entry, float) for key, entry in value.items()}
        return dict(value)
    expected = getattr(wanted, "__name__", text)
    raise CommandError(f"recipe: {name} is {value!r}; expected {'a table' if 'Mapping' in text else expected}")
