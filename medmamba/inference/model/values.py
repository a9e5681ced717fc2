"""Checks of values from a foreign JSON file. Each returns its value, or refuses it with the place in the file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from typing import Any, NoReturn, TypeVar

from .problems import ModelRefused, shown

T = TypeVar("T")
Check = Callable[[object, str], T]

_REMEDY = "get the package again, or export the model again"


def parse_json(content: bytes, file: str) -> Any:
    """JSON without what Python's reader lets pass: values given twice, NaN and infinity.

    Raises:
        ModelRefused: MM-MD-007.
    """
    try:
        text = content.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_pairs, parse_constant=_no_constant)
        # A text with half a surrogate pair parses, but can be neither printed nor written.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ModelRefused("MM-MD-007", f"{file} is no JSON ({shown(error)}); {_REMEDY}") from error
    return value


def wrong(where: str, value: object, expected: str) -> NoReturn:
    """Refuse a value of model.json with MM-MD-009."""
    raise ModelRefused("MM-MD-009", f"model.json: {where} is {shown(value)}; expected {expected}; {_REMEDY}")


def mapping(value: object, where: str, known: Collection[str] | None = None) -> dict[str, Any]:
    """A mapping; with ``known``, one with exactly these keys."""
    if not isinstance(value, dict):
        wrong(where, value, "a mapping")
    if known is not None:
        missing = [key for key in known if key not in value]
        surplus = [key for key in value if key not in known]
        if missing:
            wrong(where, sorted(value), f"also {', '.join(missing)}")
        if surplus:
            wrong(where, sorted(surplus), f"nothing besides {', '.join(known)}")
    return value


def entry(value: dict[str, Any], key: str, where: str) -> Any:
    """A value that must be there."""
    if key not in value:
        wrong(where, sorted(value), f"also {key}")
    return value[key]


def text(value: object, where: str) -> str:
    """A text that is not empty."""
    if not isinstance(value, str) or not value:
        wrong(where, value, "a text")
    return value


def one_of(value: object, where: str, known: Collection[str]) -> str:
    """One of some texts."""
    if not isinstance(value, str) or value not in known:
        wrong(where, value, " or ".join(known))
    return value


def whole(value: object, where: str, low: int = 0, high: int = 2**31) -> int:
    """A whole number from ``low`` to ``high``."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        wrong(where, value, f"a whole number from {low} to {high}")
    return value


def number(value: object, where: str) -> float:
    """A finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < math.inf:
        wrong(where, value, "a number")
    try:
        return float(value)
    except OverflowError:
        wrong(where, value, "a number")


def size(value: object, where: str) -> float:
    """A number above 0."""
    if number(value, where) <= 0:
        wrong(where, value, "a number above 0")
    return number(value, where)


def flag(value: object, where: str) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        wrong(where, value, "true or false")
    return value


def items(value: object, where: str, check: Check[T], length: int | None = None) -> list[T]:
    """A list of values of one kind; with ``length``, of so many."""
    if not isinstance(value, list):
        wrong(where, value, "a list")
    if length is not None and len(value) != length:
        wrong(where, value, f"{length} values")
    return [check(each, f"{where}[{i}]") for i, each in enumerate(value)]


def optional(value: object, where: str, check: Check[T]) -> T | None:
    """None, or a value of one kind."""
    return None if value is None else check(value, where)


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError(f"a name is given twice among {shown([name for name, _ in pairs])}")
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
