"""The loss of a student that learns from a teacher beside the labels, and what the plans say about it.

G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531, section 2. With
student logits z, teacher logits v and a temperature T, at every head of deep supervision

    loss = (1 - weight) * nnU-Net's loss + weight * T^2 * KL(softmax(v / T) || softmax(z / T)),

the divergence averaged over voxels, heads weighted as nnU-Net weights them. Where labels are regions, each of them is a
Bernoulli variable, sigmoid in place of softmax, and the divergence is averaged over regions too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from medmamba.nnunet.errors import UserFacingError

_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


class DistillationError(UserFacingError, ValueError):
    """A distillation, usually one written in the plans, has an unknown entry or a value out of range."""


@dataclass(frozen=True)
class Distillation:
    """Which teacher, and how much of it; part of the plans, under ``plans["medmamba"]["distillation"]``.

    Attributes:
        teacher: trained folder, relative to ``nnUNet_results`` where it lies there.
        checkpoint: name of the file in every fold.
        sha256: fold of the teacher -> SHA-256 of its checkpoint, which is what tells teachers apart.
        weight: of the divergence; nnU-Net's loss has the rest of 1.
        temperature: T.
    """

    teacher: str
    checkpoint: str
    sha256: Mapping[str, str]
    weight: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        for name in ("teacher", "checkpoint"):
            value = getattr(self, name)
            _check(name, value, isinstance(value, str) and bool(value), "a text")
        is_good = isinstance(self.sha256, Mapping) and bool(self.sha256)
        is_good = is_good and all(isinstance(v, str) and _SHA256.fullmatch(v) for v in self.sha256.values())
        _check("sha256", self.sha256, is_good, "64 hexadecimal digits for each fold of the teacher")
        is_share = _is_number(self.weight) and 0 <= self.weight <= 1
        _check("weight", self.weight, is_share, "a number from 0 to 1")
        is_temperature = _is_number(self.temperature) and self.temperature > 0
        _check("temperature", self.temperature, is_temperature, "a number above 0")

    @classmethod
    def from_plans(cls, plans: Mapping[str, Any]) -> Distillation | None:
        """What a plans dictionary asks for, or None where it names no teacher.

        Raises:
            DistillationError: an entry is missing or unknown, or a value out of range.
        """
        given = plans.get("medmamba", {}).get("distillation")
        if given is None:
            return None
        known = [field.name for field in fields(cls)]
        unknown = [name for name in given if name not in known]
        missing = [name for name in known[:3] if name not in given]
        if unknown or missing:
            raise DistillationError(
                f"the distillation in the plans has unknown entries {unknown} or lacks {missing}; known: "
                f"{', '.join(known)}; plan again with --teacher"
            )
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """All entries as plain JSON values."""
        return {**asdict(self), "sha256": dict(self.sha256)}


class DistillationLoss(nn.Module):
    """nnU-Net's loss, and within :meth:`taught` the divergence from a teacher beside it.

    Without a teacher's answer, as in validation, it is nnU-Net's loss alone: values with and without a teacher can be
    compared.

    Args:
        host: nnU-Net's loss, with deep supervision or without.
        weight, temperature: see :class:`Distillation`.
        has_regions: outputs are regions; targets are masks, the last one of voxels to ignore if there is such a label.
        ignore_label: of voxels that nnU-Net leaves out, or None.

    Attributes:
        parts: of the last call within :meth:`taught`: nnU-Net's loss, and T^2 times the divergence.
    """

    def __init__(
        self, host: nn.Module, *, weight: float, temperature: float, has_regions: bool, ignore_label: int | None
    ) -> None:
        super().__init__()
        self.host = host
        self.weight = weight
        self.temperature = temperature
        self.has_regions = has_regions
        self.ignore_label = ignore_label
        self.parts: dict[str, Tensor] = {}
        self._answers: Sequence[Sequence[Tensor]] | None = None

    @contextmanager
    def taught(self, answers: Sequence[Sequence[Tensor]]) -> Iterator[None]:
        """Within ``with``, learn from these logits.

        Args:
            answers: of every network of the teacher to the patch that the loss is asked about: logits, finest first.
        """
        self._answers = answers
        try:
            yield
        finally:
            self._answers = None

    def forward(self, output: Any, target: Any) -> Tensor:
        """The loss of logits (B, C, *spatial), or of a list of them by head, as nnU-Net's losses take it."""
        loss: Tensor = self.host(output, target)
        if self._answers is None:
            return loss
        outputs, targets = ([value] if isinstance(value, Tensor) else value for value in (output, target))
        weights = getattr(self.host, "weight_factors", (1.0,))
        divergence = sum(
            weight * self._of_head(self._answers, logits, labels)
            for weight, logits, labels in zip(
                weights, outputs, targets, strict=False
            )  # as nnU-Net: a network may have one
            if weight != 0
        )
        distilled = self.temperature**2 * divergence
        self.parts = {"segmentation": loss.detach(), "distillation": torch.as_tensor(distilled).detach()}
        return (1 - self.weight) * loss + self.weight * distilled

    def _of_head(self, answers: Sequence[Sequence[Tensor]], logits: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            expected = teacher_log_probabilities(answers, logits.shape[2:], self.temperature, self.has_regions)
        found = log_probabilities(logits, self.temperature, self.has_regions)
        return mean_divergence(expected, found, self._kept(target))

    def _kept(self, target: Tensor) -> Tensor | None:
        """Voxels that count, (B, *spatial) or with regions (B, 1, *spatial); None: all."""
        if self.ignore_label is None:
            return None
        return ~target[:, -1:].bool() if self.has_regions else target[:, 0] != self.ignore_label


def log_probabilities(logits: Tensor, temperature: float, has_regions: bool) -> Tensor:
    """Logarithms of what logits say at a temperature, in float32 or better.

    Args:
        logits: (B, C, *spatial).
        temperature: above 0.
        has_regions: every channel is a region of its own.

    Returns:
        (B, C, *spatial), or with regions (B, 2, C, *spatial): inside and outside of each.
    """
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if has_regions:
        return torch.stack([functional.logsigmoid(scaled), functional.logsigmoid(-scaled)], dim=1)
    return torch.log_softmax(scaled, dim=1)


def teacher_log_probabilities(
    answers: Sequence[Sequence[Tensor]], shape: Sequence[int], temperature: float, has_regions: bool
) -> Tensor:
    """What a teacher says at the resolution of a head: the mean probability of its networks.

    Args:
        answers: of every network: logits (B, C, *spatial), finest first.
        shape: spatial, of the head. Where a network has no logits of this shape, the probabilities of its finest are
            averaged over the voxels of each voxel of the head.
        temperature, has_regions: see :func:`log_probabilities`.

    Returns:
        as :func:`log_probabilities`.

    Raises:
        ValueError: the finest logits of a network are not a whole multiple of ``shape``.
    """
    each = [_at_resolution(answer, tuple(shape), temperature, has_regions) for answer in answers]
    # A single network must not be rounded on the way: a student that equals it has no divergence at all.
    return each[0] if len(each) == 1 else torch.logsumexp(torch.stack(each), dim=0) - math.log(len(each))


def mean_divergence(expected: Tensor, found: Tensor, kept: Tensor | None) -> Tensor:
    """Kullback-Leibler divergence of ``found`` from ``expected`` over axis 1, averaged over all others.

    Args:
        expected, found: log probabilities, (B, C, *spatial) or (B, 2, regions, *spatial).
        kept: bool, of the shape without axis 1 or broadcastable to it: what counts; None: all. Where nothing counts
            the result is 0.
    """
    divergence = (expected.exp() * (expected - found)).sum(dim=1)
    if kept is None:
        return divergence.mean()
    kept = kept.expand_as(divergence)
    return torch.where(kept, divergence, 0).sum() / kept.sum().clamp(min=1)


def _at_resolution(answer: Sequence[Tensor], shape: tuple[int, ...], temperature: float, has_regions: bool) -> Tensor:
    for logits in answer:
        if tuple(logits.shape[2:]) == shape:
            return log_probabilities(logits, temperature, has_regions)
    finest = log_probabilities(answer[0], temperature, has_regions).exp()
    spatial = finest.shape[-len(shape) :]
    if any(fine % coarse for fine, coarse in zip(spatial, shape, strict=True)):
        raise ValueError(f"logits of the teacher at {tuple(spatial)} cannot be averaged to {shape}: no whole multiple")
    pooled = _average(finest.flatten(1, -len(shape) - 1), shape)
    # A probability below the smallest number is none; its logarithm would be infinite, and times 0 not a number.
    tiny = torch.finfo(pooled.dtype).tiny
    return pooled.reshape(*finest.shape[: -len(shape)], *shape).clamp(min=tiny).log()


def _average(values: Tensor, shape: Sequence[int]) -> Tensor:
    """Means over blocks, (B, C, *spatial) to (B, C, *shape)."""
    pool: Any = functional.adaptive_avg_pool2d if len(shape) == 2 else functional.adaptive_avg_pool3d
    pooled: Tensor = pool(values, shape)
    return pooled


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check(name: str, value: object, is_good: bool, expected: str) -> None:
    if not is_good:
        raise DistillationError(f"distillation entry {name} is {value!r}; expected {expected}; plan again (--teacher)")
