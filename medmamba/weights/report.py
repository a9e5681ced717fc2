"""What became of every tensor of a load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """Every tensor of a checkpoint and of a network, in one of four lists.

    Attributes:
        source: whose weights these are, with the widths and blocks of the encoder.
        network: registry name of the network.
        loaded: our key -> published name, for tensors that were taken as they are.
        adapted: our key -> (published name, how).
        missing: our key -> why nothing was loaded; the parameter keeps its initial value.
        unused: published name -> why nothing of ours takes it.
    """

    source: str
    network: str
    loaded: Mapping[str, str]
    adapted: Mapping[str, tuple[str, str]]
    missing: Mapping[str, str]
    unused: Mapping[str, str]

    def summary(self) -> str:
        """Text of some ten to twenty lines: how many tensors, grouped by how or why, with an example each."""
        lines = [f"{self.source} -> {self.network}", f"  loaded   {len(self.loaded):4d} tensors as they are"]
        lines += _grouped("adapted", {key: how for key, (_, how) in self.adapted.items()})
        lines += _grouped("missing", self.missing, "of the network, which keep their initial values")
        lines += _grouped("unused", self.unused, "of the checkpoint")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()


def _grouped(title: str, reasons: Mapping[str, str], meaning: str = "") -> Iterator[str]:
    yield f"  {title:<8} {len(reasons):4d} tensors {meaning}".rstrip()
    groups: dict[str, list[str]] = {}
    for key, reason in reasons.items():
        groups.setdefault(reason, []).append(key)
    for reason, keys in groups.items():
        yield f"           {len(keys):4d}  {reason}: {keys[0]}{' ...' if len(keys) > 1 else ''}"
