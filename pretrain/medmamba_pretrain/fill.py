"""What stands in the place of masked tokens between encoder and decoder: ``token``, ``linear`` or ``toki``.

Token interpolation (TOKI) of MambaMIM (Tang et al., 2024, arXiv:2408.08070) reads the tokens along a route. Between
two visible tokens left and right, g steps apart, it runs a state-space recurrence over an interpolation of the two::

    h_0 = left        h_j = Abar h_{j-1} + Bbar s_j        j = 1 .. g - 1

    paper    s_n = (1 - n / (g + 1)) left + n / (g + 1) right    Abar = M (C, C), 0 at first       Bbar = 1
    gated    s_n = (1 - n / g) left + n / g right                Abar = exp(-softplus(theta))      Bbar = 1 - Abar

``gated`` is ours: it cannot leave the interval between its neighbours, keeps constants, and lies between linear
interpolation (Abar = 0) and repeating the left token (Abar = 1), where the paper's form grows without bound with M.
M and theta are parameters, not the A of a scan. The released code has other exponents and weights than the paper and
puts the result into the wrong axes; it is not reproduced here.

At the ends of a route a neighbour is missing. It is taken to be equal to the other one (``ends="hold"``), or a learned
token one step outside the volume (``ends="learned"``, as released).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from medmamba_kernels import Route, resolve_routes
from medmamba_kernels.routes import route_table

#: At initialisation a gap's state keeps this share of its predecessor (our choice; MambaMIM has no gated form).
_GATED_DECAY = 0.5


class TokenFill(nn.Module):
    """One learned token at every masked position, as in MAE and SparK.

    Args:
        width: C.
    """

    def __init__(self, width: int):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(width))
        nn.init.trunc_normal_(self.token, std=0.02)

    def forward(self, x_BLC: Tensor, visible_BL: Tensor, grid: Sequence[int]) -> Tensor:
        """See :meth:`RouteFill.forward`."""
        check(x_BLC, visible_BL, grid)
        return torch.where(visible_BL[..., None], x_BLC, self.token.to(x_BLC.dtype))


class RouteFill(nn.Module):
    """Base of what reads tokens along routes; a subclass has ``between``, and the result is the mean over the routes.

    Args:
        width: C.
        routes: a route set or routes; the paper reads one raster.
        ends: "hold" or "learned".
    """

    def __init__(self, width: int, *, routes: str | Sequence[str] = ("dhw",), ends: str = "hold"):
        super().__init__()
        if ends not in ("hold", "learned"):
            raise ValueError(f"unknown ends {ends!r}; known: hold, learned")
        self.routes: tuple[Route, ...] = resolve_routes(routes)
        self.ends = None if ends == "hold" else nn.Parameter(torch.zeros(2, width))

    def forward(self, x_BLC: Tensor, visible_BL: Tensor, grid: Sequence[int]) -> Tensor:
        """Fill the masked tokens.

        Args:
            x_BLC: tokens in raster order, floating point. What masked ones hold is never read.
            visible_BL: bool.
            grid: (D, H, W), L tokens.

        Returns:
            like ``x_BLC``; visible tokens are the same bits.

        Raises:
            ValueError: sizes do not fit, or a sample has no visible token.
        """
        check(x_BLC, visible_BL, grid)
        depth, height, width = grid
        table = route_table(self.routes, (depth, height, width))
        order_KL = torch.as_tensor(table.order, device=x_BLC.device).long()
        filled = torch.zeros_like(x_BLC)
        for order_L in order_KL:
            along = self._along(x_BLC[:, order_L], visible_BL[:, order_L])
            filled = filled.index_add(1, order_L, along)
        return torch.where(visible_BL[..., None], x_BLC, filled / len(self.routes))

    def _along(self, x_BLC: Tensor, visible_BL: Tensor) -> Tensor:
        """Tokens in the order of a route, filled."""
        length = x_BLC.shape[1]
        # One visible token outside either end makes every masked token lie between two visible ones.
        if self.ends is None:
            first = visible_BL.int().argmax(1)
            last = length - 1 - visible_BL.flip(1).int().argmax(1)
            outside = _pick(x_BLC, torch.stack([first, last], dim=1))
        else:
            outside = self.ends.to(x_BLC.dtype).expand(len(x_BLC), -1, -1)
        x = torch.cat([outside[:, :1], x_BLC, outside[:, 1:]], dim=1)
        visible = nn.functional.pad(visible_BL, (1, 1), value=True)
        position = torch.arange(length + 2, device=x.device)
        left = torch.where(visible, position, -1).cummax(1).values
        right = torch.where(visible, position, length + 2).flip(1).cummin(1).values.flip(1)
        return self.between(_pick(x, left), _pick(x, right), position - left, right - left)[:, 1:-1]

    def between(self, left_BLC: Tensor, right_BLC: Tensor, n_BL: Tensor, gap_BL: Tensor) -> Tensor:
        """Tokens between visible neighbours.

        Args:
            left_BLC: the visible token at or before each position.
            right_BLC: the one at or after it.
            n_BL: steps from the left one; 0 where the token is visible.
            gap_BL: steps between the two; 0 where the token is visible.

        Returns:
            (B, L, C); ``left_BLC`` where ``n_BL`` is 0.
        """
        raise NotImplementedError


class LinearFill(RouteFill):
    """Linear interpolation between the visible neighbours along a route."""

    def between(self, left_BLC: Tensor, right_BLC: Tensor, n_BL: Tensor, gap_BL: Tensor) -> Tensor:
        return torch.lerp(left_BLC, right_BLC, _share(n_BL, gap_BL.clamp_min(1), left_BLC))


class PaperTOKI(RouteFill):
    """TOKI with the formula of the paper: ``M`` is a learned (C, C) matrix, zero at first."""

    def __init__(self, width: int, *, routes: str | Sequence[str] = ("dhw",), ends: str = "hold"):
        super().__init__(width, routes=routes, ends=ends)
        self.M = nn.Parameter(torch.zeros(width, width))

    def between(self, left_BLC: Tensor, right_BLC: Tensor, n_BL: Tensor, gap_BL: Tensor) -> Tensor:
        s = torch.lerp(left_BLC, right_BLC, _share(n_BL, gap_BL + 1, left_BLC))
        M = self.M.to(s.dtype)
        return recurrence(s, n_BL, M, lambda power, h: h @ power.T, lambda power: power @ power)

    def spectral_radius(self) -> Tensor:
        """Largest absolute eigenvalue of M; above 1 the fill grows with the length of a gap."""
        return torch.linalg.eigvals(self.M.detach().double()).abs().max()


class GatedTOKI(RouteFill):
    """TOKI in a form that stays between its neighbours: a learned decay ``exp(-softplus(theta))`` per channel."""

    def __init__(self, width: int, *, routes: str | Sequence[str] = ("dhw",), ends: str = "hold"):
        super().__init__(width, routes=routes, ends=ends)
        self.theta = nn.Parameter(torch.full((width,), math.log(1 / _GATED_DECAY - 1)))

    @property
    def decay(self) -> Tensor:
        """Abar per channel, in (0, 1): ``exp(-softplus(theta)) = sigmoid(-theta)``."""
        return torch.sigmoid(-self.theta)

    def between(self, left_BLC: Tensor, right_BLC: Tensor, n_BL: Tensor, gap_BL: Tensor) -> Tensor:
        s = torch.lerp(left_BLC, right_BLC, _share(n_BL, gap_BL.clamp_min(1), left_BLC))
        decay = self.decay.to(s.dtype)
        driven = torch.where((n_BL == 0)[..., None], s, (1 - decay) * s)
        return recurrence(driven, n_BL, decay, torch.mul, torch.square)


FILLS: dict[str, Callable[..., nn.Module]] = {
    "token": TokenFill,
    "linear": LinearFill,
    "toki": GatedTOKI,
    "toki-paper": PaperTOKI,
}


def get_fill(name: str) -> Callable[..., nn.Module]:
    """The class of a fill.

    Raises:
        KeyError: an unknown name; the message lists the known ones.
    """
    if name not in FILLS:
        raise KeyError(f"no fill {name!r}; known: {', '.join(FILLS)}")
    return FILLS[name]


def recurrence(
    s_BLC: Tensor,
    n_BL: Tensor,
    power: Tensor,
    apply: Callable[[Tensor, Tensor], Tensor],
    square: Callable[[Tensor], Tensor],
) -> Tensor:
    """h = A h_{previous} + s, started anew at h = s where n is 0, in log2(longest gap) steps over the whole sequence.

    After i steps every position holds the last 2^i terms of its sum; adding A^(2^i) times the position 2^i before
    doubles them.

    Args:
        s_BLC: what drives each position.
        n_BL: positions since the last start.
        power: A, as ``apply`` and ``square`` understand it.
        apply: ``apply(power, h_BLC)``.
        square: ``square(power)``.
    """
    longest = int(n_BL.max())
    step = 1
    h = s_BLC
    while step <= longest:
        before = nn.functional.pad(h, (0, 0, step, 0))[:, : h.shape[1]]
        before = torch.where((n_BL >= step)[..., None], before, 0)
        h = h + apply(power, before)
        power = square(power)
        step *= 2
    return h


def check(x_BLC: Tensor, visible_BL: Tensor, grid: Sequence[int]) -> None:
    """Raise ValueError unless tokens, mask and grid fit together and every sample has a visible token."""
    if x_BLC.ndim != 3 or tuple(visible_BL.shape) != tuple(x_BLC.shape[:2]) or visible_BL.dtype != torch.bool:
        raise ValueError(
            f"expected tokens (B, L, C) and a bool mask (B, L), got {tuple(x_BLC.shape)} and {visible_BL.dtype} "
            f"{tuple(visible_BL.shape)}"
        )
    if len(grid) != 3 or math.prod(grid) != x_BLC.shape[1]:
        raise ValueError(f"a grid of {tuple(grid)} does not have {x_BLC.shape[1]} tokens; give (D, H, W)")
    if not bool(visible_BL.any(1).all()):
        raise ValueError("a sample has no visible token to fill from; lower the mask ratio or enlarge the patch")


def _pick(x_BLC: Tensor, index_BK: Tensor) -> Tensor:
    """Tokens at positions of their own per sample: (B, K, C)."""
    return x_BLC.gather(1, index_BK[..., None].expand(-1, -1, x_BLC.shape[-1]))


def _share(n_BL: Tensor, of_BL: Tensor, like: Tensor) -> Tensor:
    return (n_BL.to(like.dtype) / of_BL)[..., None]
