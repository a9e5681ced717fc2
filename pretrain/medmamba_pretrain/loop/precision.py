"""Number formats of a run."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from medmamba_pretrain.recipe import Recipe


@dataclass(frozen=True)
class Precision:
    """Of weights and images, and of what is computed with them.

    Attributes:
        device: where.
        dtype: of weights and images.
        has_autocast: whether operations that bear it run in bfloat16.
    """

    device: torch.device
    dtype: torch.dtype
    has_autocast: bool

    @classmethod
    def of(cls, recipe: Recipe, device: torch.device) -> Precision:
        """What a recipe asks for on a device."""
        dtype = torch.float64 if recipe.precision == "float64" else torch.float32
        on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return cls(device, dtype, recipe.precision == "bfloat16" or (recipe.precision == "auto" and on_gpu))

    def autocast(self) -> AbstractContextManager[None]:
        """Around a forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.has_autocast)
