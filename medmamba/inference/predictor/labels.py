"""From logits to labels, as nnU-Net decides: the largest of the classes, or each region by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Decision:
    """What nnU-Net's ``dataset.json`` says about the channels of a network.

    Attributes:
        names: label -> name, background included; the names of regions are those of the label they write.
        regions: for datasets with regions the label that every channel writes, in the order of the channels; a later
            one overwrites an earlier one. Empty: channel i is label i.
        channels: of the network's output.
    """

    names: Mapping[int, str]
    regions: tuple[int, ...]
    channels: int

    @classmethod
    def of(cls, dataset_json: Mapping[str, Any]) -> Decision:
        """From the entries ``labels`` and ``regions_class_order``.

        Raises:
            ValueError: labels that are not 0, 1, 2, ..., or regions without their order.
        """
        labels = {name: value for name, value in dataset_json["labels"].items() if name != "ignore"}
        if not any(isinstance(value, list | tuple) and len(value) > 1 for value in labels.values()):
            plain = {_only(value): name for name, value in labels.items()}
            if sorted(plain) != list(range(len(plain))):
                raise ValueError(f"labels must be 0, 1, 2, ... without a gap, got {sorted(plain)}; see dataset.json")
            return cls(dict(sorted(plain.items())), (), len(plain))
        order = dataset_json.get("regions_class_order")
        names = [name for name, value in labels.items() if not _is_background(value)]
        if not isinstance(order, Sequence) or len(order) != len(names):
            raise ValueError(f"dataset.json has regions {names} and regions_class_order {order!r}; one label for each")
        written = {0: "background", **{int(label): name for label, name in zip(order, names, strict=True)}}
        return cls(dict(sorted(written.items())), tuple(int(label) for label in order), len(names))

    @property
    def dtype(self) -> torch.dtype:
        """uint8 where it suffices, else int32."""
        return torch.uint8 if max(self.names) < 256 else torch.int32

    def decide(self, logits: Tensor) -> Tensor:
        """(K, *spatial) logits -> (*spatial) labels.

        A region is where its logit is above 0, that is its probability above one half.
        """
        if not self.regions:
            return logits.argmax(0).to(self.dtype)
        result = torch.zeros(logits.shape[1:], dtype=self.dtype)
        for channel, label in zip(logits, self.regions, strict=True):
            result[channel > 0] = label
        return result


def _only(value: Any) -> int:
    return int(value[0]) if isinstance(value, list | tuple) else int(value)


def _is_background(value: Any) -> bool:
    return {int(label) for label in (value if isinstance(value, list | tuple) else [value])} == {0}
