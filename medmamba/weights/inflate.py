"""From tensors of a published 2D network to those of ours, in 2D or 3D.

Every rule keeps the published function where it can be kept. On a volume of depth 1 whose plan has stride 1 along
depth, the 3D network computes what the 2D one does; with strides along depth it does so for a volume that does not
change along depth, as far as the routes do not carry the state from slice to slice.

=====================  ==========================================================================================
patch embedding        repeated along depth, divided by their number (kernel and stride are the same: a mean of slices)
patch merging          norm repeated per depth offset; Linear repeated and divided by their number
expanding              outputs repeated per depth offset
other convolutions     in the centre slice along depth, zeros beside it
scans                  route by route, see :func:`route_sources`
first convolution      with another number C of input channels: the sum over its channels, divided by C
=====================  ==========================================================================================
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from medmamba.layers import LargeKernelExpand, PatchEmbed, PatchExpand, PatchMerge
from medmamba.mixers import ScanCore
from medmamba.networks.arguments import VSS_ROUTES
from medmamba.networks.mhsvm import IN_PLANE
from medmamba_kernels import Route, resolve_routes

from .published import HEADS

# Odd, not square and not small: on it the routes of a plane are told apart by where they begin.
_PROBE = (1, 5, 7)


@dataclass(frozen=True)
class Step:
    """One change of a tensor.

    Attributes:
        how: in words, for the report.
        apply: the change.
    """

    how: str
    apply: Callable[[Tensor], Tensor]


class NoCounterpartError(Exception):
    """A parameter of ours that no published tensor can stand for; the text is the reason."""


Rule = Sequence[Step] | NoCounterpartError


def rules_of(network: nn.Module) -> dict[str, Rule]:
    """Steps that lead from a published tensor to a parameter or buffer of ours, by its key.

    Keys without an entry take their tensor as it is. A rule never has the last word about the shape: the caller
    compares.
    """
    rules: dict[str, Rule] = {}
    for path, module in network.named_modules():
        if isinstance(module, ScanCore):
            found: Mapping[str, Rule] = _scan(module, _published_routes(path))
        elif isinstance(module, PatchEmbed):
            found = {"proj.weight": _mean_of_slices(cast(nn.Conv2d | nn.Conv3d, module.proj).kernel_size)}
        elif isinstance(module, PatchMerge):
            found = _merging(_depth(module.stride))
        elif isinstance(module, PatchExpand):
            found = {"expand.weight": _repeated(_depth(module.stride))}
        elif isinstance(module, LargeKernelExpand):
            found = _large_kernel(module)
        elif isinstance(module, nn.Conv3d):
            found = {"weight": _centred(module.kernel_size[0])}
        else:
            continue
        for name, rule in found.items():
            rules.setdefault(f"{path}.{name}" if path else name, rule)  # outer modules come first and know better
    return rules


def channels_of_image(count: int, published: int) -> list[Step]:
    """The first convolution for ``count`` input channels instead of the ``published`` ones.

    Published networks repeat a grey image to three channels. The sum over the channels, divided by ``count``, gives the
    same for an image whose channels are all equal; for one channel it is the plain sum.
    """
    if count == published:
        return []

    def spread(value: Tensor) -> Tensor:
        total = value.sum(1, keepdim=True) / count
        return total.expand(-1, count, *[-1] * (value.dim() - 2))

    return [Step(f"image channels: {published} summed, shared by {count}", spread)]


def route_sources(routes: Sequence[Route], published: Sequence[Route]) -> list[int]:
    """For every route the number of the published one whose weights it takes.

    On one plane (depth 1) a route of a volume is a route of an image. It takes the published route that visits the
    plane in the same order, or else the first that begins with the same two tokens: same corner, same fastest axis.
    Where the state is cleared does not matter.

    Raises:
        NoCounterpartError: a route that no published one resembles.
    """
    orders = [route.order(_PROBE) for route in published]
    sources = []
    for route in routes:
        order = route.order(_PROBE)
        exact = [i for i, known in enumerate(orders) if torch.equal(known, order)]
        similar = [i for i, known in enumerate(orders) if torch.equal(known[:2], order[:2])]
        if not exact and not similar:
            raise NoCounterpartError(
                f"route {route} is none of the published {', '.join(map(str, published))} on a plane; build the "
                "network with routes that are"
            )
        sources.append((exact or similar)[0])
    return sources


def _published_routes(path: str) -> tuple[Route, ...]:
    """Routes of the 2D scan behind one of ours, from its place: a head of MHS-VM, or VMamba's block."""
    _, heads, number = path.rpartition(".mixer.heads.")
    if not heads:
        return resolve_routes(VSS_ROUTES[2])
    names = [IN_PLANE[letter] for letter in HEADS]
    return resolve_routes(names[int(number) % len(names)])


def _scan(core: ScanCore, published: Sequence[Route]) -> dict[str, Rule]:
    count, states = len(published), core.d_state
    try:
        sources = route_sources(core.routes, published)
    except NoCounterpartError as error:
        return dict.fromkeys(("x_proj", "dt_proj", "dt_bias", "A_log", "D"), error)
    taken = Counter(sources)
    # The results of the routes are summed: copies of one route share its part of the sum. A gate compares them instead.
    shares = torch.tensor([1 if core.fusion else 1 / taken[source] for source in sources], dtype=torch.float64)

    # Where the shapes do not fit, a tensor passes unchanged: the caller compares them.
    def split(value: Tensor) -> Tensor:
        return value.unflatten(0, (count, -1)) if len(value) % count == 0 else value

    def select(value: Tensor) -> Tensor:
        return value[sources] if len(value) == count else value

    def share(value: Tensor) -> Tensor:
        return value * shares.to(value).view(-1, *[1] * (value.dim() - 1)) if len(value) == len(shares) else value

    def share_rows_of_c(value: Tensor) -> Tensor:
        return torch.cat([value[:, :-states], share(value[:, -states:])], dim=1)

    copied = Step(_how(core.routes, published, sources), select)
    is_shared = bool((shares < 1).any())
    how = "a route that is taken n times gives 1/n of its result"
    return {
        "x_proj": [copied, *([Step(how, share_rows_of_c)] if is_shared else [])],
        "dt_proj": [copied],
        "dt_bias": [copied],
        "A_log": [Step("", split), copied],
        "D": [Step("", split), copied, *([Step(how, share)] if is_shared else [])],
    }


def _how(routes: Sequence[Route], published: Sequence[Route], sources: Sequence[int]) -> str:
    """In words which routes take whose weights; empty where every published route is read as published."""
    pairs = [(route, published[source]) for route, source in zip(routes, sources, strict=True)]
    is_exact = all(torch.equal(route.order(_PROBE), source.order(_PROBE)) for route, source in pairs)
    if is_exact and list(sources) == list(range(len(published))):
        return ""
    takers = {source: [str(route) for route, other in pairs if other == source] for source in published}
    texts = [f"{' '.join(names) or 'none'} from {source}" for source, names in takers.items()]
    return f"routes {', '.join(texts)}{'' if is_exact else ' (not the same order in a plane, only the same beginning)'}"


def _depth(stride: Sequence[int]) -> int:
    return stride[0] if len(stride) == 3 else 1


def _mean_of_slices(kernel_size: Sequence[int]) -> list[Step]:
    if len(kernel_size) == 2:
        return []
    depth = kernel_size[0]

    def spread(value: Tensor) -> Tensor:
        return value.unsqueeze(2).expand(-1, -1, depth, -1, -1) / depth

    return [Step(f"mean of {depth} slices" if depth > 1 else "", spread)]


def _merging(depth: int) -> dict[str, Rule]:
    weight = [Step(f"repeated for {depth} depth offsets, divided by {depth}", lambda v: v.repeat(1, depth) / depth)]
    return {
        "norm.weight": _repeated(depth),
        "norm.bias": _repeated(depth),
        "reduction.weight": weight if depth > 1 else [],
    }


def _repeated(depth: int) -> list[Step]:
    if depth == 1:
        return []
    return [
        Step(f"repeated for {depth} depth offsets", lambda v: v.repeat(depth, *[1] * (v.dim() - 1)) if v.dim() else v)
    ]


def _centred(depth: int) -> list[Step]:
    def place(value: Tensor) -> Tensor:
        if value.dim() != 4:  # a Linear, which a convolution of kernel 1 takes as it is
            return value
        kernel = value.new_zeros(*value.shape[:2], depth, *value.shape[2:])
        kernel[:, :, depth // 2] = value
        return kernel

    return [Step(f"in the centre of {depth} slices" if depth > 1 else "", place)]


def _large_kernel(module: LargeKernelExpand) -> dict[str, Rule]:
    repeated = _repeated(_depth(module.stride))
    kernel_size = cast(nn.Conv2d | nn.Conv3d, module.depthwise).kernel_size
    centred = _centred(kernel_size[0]) if len(kernel_size) == 3 else []
    norm = list(repeated)
    if not hasattr(module.expand_norm, "running_mean"):
        norm.append(Step("of a BatchNorm, in an InstanceNorm with statistics of its own", lambda value: value))
    return {
        "conv.weight": repeated,
        "conv.bias": repeated,
        "depthwise.weight": [*repeated, *centred],
        "depthwise.bias": repeated,
        **{f"expand_norm.{name}": norm for name in ("weight", "bias")},
        **{f"expand_norm.{name}": repeated for name in ("running_mean", "running_var")},
    }
