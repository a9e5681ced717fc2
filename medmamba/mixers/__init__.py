"""Token mixers: what happens between the tokens of a scan stage.

A *core* maps (B, L, C) tokens of a (D, H, W) grid to tokens of the same shape. Every network with scans takes the
name of a core as ``ssm_mode``, so each has its controls: the same network with the scan replaced. A core is built
from ``(width, *, d_state, dt_rank, routes, kernel_size, dt_range=None, fusion=None)`` and options of its own with
defaults, and takes what it needs.

Its forward is ``(u, grid, *, mask=None)``. With a ``mask``, (B, L) bool and True for tokens that take part, the others
are not read and their result is 0. To a scan it is as if they had been cut out of every route; the segments of a route
with resets stay the same. To a convolution they are zeros.

:func:`token_mask` gives all cores of a network their masks, from one of voxels.

:class:`MultiHeadCore` puts several cores side by side; :class:`GatedFusion` is a ``fusion``.

A core of a third party is an entry point of the group ``medmamba.cores`` that leads to such a class; where a core is
named, its name will do. :mod:`medmamba.mixers.laws` says what every core and mixer must do.
"""

from __future__ import annotations

from torch import nn

from medmamba.entry_points import entry

from .attention import AttentionCore
from .controls import DepthwiseCore, LTICore, ShuffledCore, WindowedCore
from .fusion import GatedFusion, rescaled_threshold
from .global_conv import GlobalConvCore
from .heads import MultiHeadCore
from .hsm_ssd import HiddenStateMixerCore
from .identity import IdentityCore
from .mamba import Mamba, MambaLayer
from .nc_ssd import NonCausalCore
from .placed import PlacedScan, initialise_step_sizes, placed_scans
from .routed import RoutedScan
from .scan import ScanCore
from .scan_input import clip_scan_inputs, counted_scan_inputs, scan_names
from .spatial import SpatialCore
from .ssd import SSDCore
from .token_mask import pool_mask, token_mask

CORES: dict[str, type[nn.Module]] = {
    "attention": AttentionCore,
    "dwconv": DepthwiseCore,
    "global_conv": GlobalConvCore,
    "hsm_ssd": HiddenStateMixerCore,
    "identity": IdentityCore,
    "lti": LTICore,
    "nc_ssd": NonCausalCore,
    "scan": ScanCore,
    "shuffled": ShuffledCore,
    "spatial": SpatialCore,
    "ssd": SSDCore,
    "windowed": WindowedCore,
}

#: Group of the entry points of third parties.
GROUP = "medmamba.cores"

#: Cores that stand for the scan in a comparison, with its number of parameters (``identity`` has none to match).
CONTROLS = ("dwconv", "identity", "lti", "shuffled", "windowed")


def get_core(name: str) -> type[nn.Module]:
    """The class of a core, ours or a third party's.

    Raises:
        KeyError: an unknown name; the message lists the known ones.
        TypeError: an entry point that leads to something else.
    """
    return entry(GROUP, name, CORES, "ssm_mode", _problem)


def _problem(found: object) -> str:
    if isinstance(found, type) and issubclass(found, nn.Module):
        return ""
    kind = found.__name__ if isinstance(found, type) else f"a {type(found).__name__}"
    return f"{kind}, not to a class of torch.nn.Module"


__all__ = [
    "CONTROLS",
    "CORES",
    "GROUP",
    "AttentionCore",
    "DepthwiseCore",
    "GatedFusion",
    "GlobalConvCore",
    "HiddenStateMixerCore",
    "IdentityCore",
    "LTICore",
    "Mamba",
    "MambaLayer",
    "MultiHeadCore",
    "NonCausalCore",
    "PlacedScan",
    "RoutedScan",
    "SSDCore",
    "ScanCore",
    "ShuffledCore",
    "SpatialCore",
    "WindowedCore",
    "clip_scan_inputs",
    "counted_scan_inputs",
    "get_core",
    "initialise_step_sizes",
    "placed_scans",
    "pool_mask",
    "rescaled_threshold",
    "scan_names",
    "token_mask",
]
