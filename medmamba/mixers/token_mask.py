"""Forward passes in which part of the voxels is no token: padding, or the air around a patient.

Dao's and Gu's scan skips a token whose step size is 0: the state passes it unchanged. Token pruning (Zhan et al.,
"Exploring Token Pruning in Vision State Space Models", 2024, arXiv:2409.18962) chooses such tokens by a learned score;
here they are given, by what is known of the image, so that the result does not depend on what they hold.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def token_mask(network: nn.Module, mask: Tensor) -> Iterator[None]:
    """Forward passes of a network within this context hand every core the mask of its grid.

    A token takes part if any of its voxels does. Only what the cores see changes. Convolutions around them read all
    voxels: a masked voxel next to a kept one is seen by it, and what it saw goes on with the scan. A masked voxel out
    of reach of those convolutions has no influence on kept tokens, except on the means and variances of normalisations
    over space. A mask that keeps all tokens gives the same bits as none. A core that was called with a mask keeps it;
    the innermost of several contexts counts.

    It holds in the calling thread, for forward passes. A network that recomputes cores in the backward pass
    (checkpointing) needs that pass within the context as well.

    Args:
        network: any module with cores, see :mod:`medmamba.mixers`; one without runs as it is.
        mask: (B, D, H, W), or (B, H, W) for images, bool; True = takes part. Along every axis a core's grid must
            divide it.

    Raises:
        TypeError, ValueError: a mask that is not bool, or has another number of axes; in a forward pass, another batch
            or a grid that does not divide it.
    """
    masks = _Masks(mask)
    if bool(mask.all()):
        yield
        return
    hook = masks.hook(threading.get_ident())
    handles = [
        core.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
        for core in network.modules()
        if _takes_mask(core)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def pool_mask(mask: Tensor, grid: Sequence[int]) -> Tensor:
    """The mask of a grid of tokens: True where any of a token's voxels is.

    Args:
        mask: (B, D, H, W) or (B, H, W) bool.
        grid: (D, H, W) tokens; D is 1 for an image.

    Returns:
        (B, L) bool, in raster order.

    Raises:
        ValueError: a grid that does not divide the mask.
    """
    volume = mask if mask.ndim == 4 else mask.unsqueeze(1)
    sizes = volume.shape[1:]
    if any(tokens < 1 or size % tokens for size, tokens in zip(sizes, grid, strict=True)):
        raise ValueError(
            f"a mask of {tuple(sizes)} voxels cannot be divided into {tuple(grid)} tokens; give one that has the "
            "shape of the network's input"
        )
    for axis, tokens in enumerate(grid, start=1):
        volume = volume.unflatten(axis, (tokens, -1)).any(axis + 1)
    return volume.flatten(1)


class _Masks:
    """One mask of voxels on the grids that ask for it."""

    def __init__(self, mask: Tensor) -> None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask has dtype {mask.dtype}, expected torch.bool")
        if mask.ndim not in (3, 4):
            raise ValueError(f"mask has shape {tuple(mask.shape)}, expected (B, D, H, W) or (B, H, W)")
        self._mask = mask
        self._pooled: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def on(self, grid: tuple[int, ...], batch: int, device: torch.device) -> Tensor:
        """(B, L) for a grid; pooled once."""
        if batch != self._mask.shape[0]:
            raise ValueError(f"the mask is for a batch of {self._mask.shape[0]}, and this forward pass has {batch}")
        key = (grid, device)
        if key not in self._pooled:
            self._pooled[key] = pool_mask(self._mask, grid).to(device)
        return self._pooled[key]

    def hook(self, thread: int) -> Any:
        def add(core: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any] | None = None) -> Any:
            # Another thread may run the network while hooks come and go, and sees them for moments without options.
            if options is None or threading.get_ident() != thread or options.get("mask") is not None:
                return None
            u, grid = inputs
            return inputs, {**options, "mask": self.on(tuple(grid), u.shape[0], u.device)}

        return add


def _takes_mask(module: nn.Module) -> bool:
    """Whether a module is called as a core: ``(u, grid, *, mask=None)``."""
    return {"u", "grid", "mask"} <= set(inspect.signature(module.forward).parameters)
