"""A token mixing block as data: grid, routes, assignment, core, merge, modulation, channel mixing, local part.

Every published mixer is one choice of each. All parts work on tokens (B, L, C) in the raster order of a (D, H, W) grid
and are called ``part(u, grid, mask=None)``, as the cores are (:mod:`medmamba.mixers`), so they nest in any order, and
masked tokens influence no others in any of them.

options.py      :class:`BlockOptions`: the choices, checked, from JSON
block.py        the block: residual parts one after the other
token_mixer.py  projections, gate and modulation around the mixing
grids.py        which grid is read: full, pooled, phases, profiles
assign.py       which channels a route reads: all, groups, one half, interleaved streams
merges.py       how the results of routes become one
modulation.py   squeeze and excitation, affinity with the input
channel_mix.py  what follows between the channels
local.py        convolutions in front of the mixing or beside it
tokens.py       convolutions and means of tokens

The ideas are those of the papers in :mod:`medmamba.presets`; the code knows none of them by name.
"""

from __future__ import annotations

from .block import MixerBlock, mixer_block
from .options import BlockOptions, mixer_builder

__all__ = ["BlockOptions", "MixerBlock", "mixer_block", "mixer_builder"]
