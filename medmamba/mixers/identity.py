"""The control without a scan: tokens do not see each other here at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from .mask import keep


class IdentityCore(nn.Module):
    """Returns its input, 0 where it is masked.

    Takes the arguments of :class:`medmamba.mixers.scan.ScanCore` and ignores them.
    """

    def __init__(
        self,
        width: int,
        *,
        d_state: int,
        dt_rank: int,
        routes: str | Sequence[str],
        kernel_size: Sequence[int] = (3, 3, 3),
        dt_range: Sequence[float] | Sequence[Sequence[float]] | None = None,
        fusion: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__()

    def forward(self, u: Tensor, grid: tuple[int, int, int], *, mask: Tensor | None = None) -> Tensor:
        return keep(u, mask)
