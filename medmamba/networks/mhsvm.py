"""MHS-VM (Ji, "MHS-VM: Multi-Head Scanning in Parallel Subspaces for Vision Mamba", 2024, arXiv:2406.05992).

The original is a 2D network: VM-UNet's shape (:mod:`medmamba.networks.vmunet`) with another operator in its blocks.
Where VM-UNet sums one scan along four rasters, here n heads scan a slice of the channels each, every head along the
routes of a pattern of its own, and a gate weighs the sum of a head's routes by how much they disagree.

``native`` and ``faithful`` geometry as in VM-UNet. On an image the faithful geometry equals the released 2D
operators weight for weight; so it does on a volume of depth 1 with the published routes (``IN_PLANE``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from medmamba.layers import DropPath, conv
from medmamba.mixers import GatedFusion, MultiHeadCore, get_core, initialise_step_sizes, rescaled_threshold
from medmamba_kernels import resolve_routes

from .arguments import Mixer, blocks_of
from .spec import NetworkSpec, Paper
from .unet import total_strides
from .vmunet import vss_unet

#: Pattern of a head (C snake, X diagonal, S spiral, Z raster) -> its published routes, which stay in the H-W plane.
IN_PLANE = {"C": "mhs_c4", "X": "mhs_x4", "S": "mhs_s4", "Z": "mhs_z4"}
#: The same patterns in a volume: once per normal of the slices (X, S) or per fastest axis (C, Z), and back.
IN_VOLUME = {"C": "mhs_c6", "X": "mhs_x6", "S": "mhs_s6", "Z": "mhs_z6"}
_HEADS = 4


class MHSBlock(nn.Module):
    """VSS block of MHS-VM, channels last: (B, *spatial, d) -> same.

    (u, z) = in-projection of LayerNorm(x); u -> depthwise convolution, SiLU, mixer;
    x + DropPath(LayerNorm(u) * SiLU(z)), with an out-projection before the residual if asked for.

    Args:
        width: d.
        mixer: builds the token mixer (B, L, d), grid -> (B, L, d) from the width.
        kernel_size: of the depthwise convolution, per axis.
        drop_path: rate of stochastic depth.
        has_out_projection: figure 1 of the paper draws one, the released code has none.
    """

    def __init__(
        self,
        width: int,
        *,
        mixer: Callable[..., nn.Module],
        kernel_size: Sequence[int],
        drop_path: float,
        has_out_projection: bool,
    ):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.in_proj = nn.Linear(width, 2 * width, bias=False)
        self.conv = conv(width, width, kernel_size, groups=width)
        self.act = nn.SiLU()
        self.mixer = mixer(width, kernel_size=kernel_size)
        self.out_norm = nn.LayerNorm(width)
        self.out_proj = nn.Linear(width, width, bias=False) if has_out_projection else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.in_proj(self.norm(x)).chunk(2, dim=-1)
        u = self.act(self.conv(u.movedim(-1, 1)).movedim(1, -1))
        batch, *spatial, channels = u.shape
        depth, height, width = (1,) * (3 - len(spatial)) + tuple(spatial)
        y = self.mixer(u.reshape(batch, -1, channels), (depth, height, width)).view(u.shape)
        return x + self.drop_path(self.out_proj(self.out_norm(y) * self.act(z)))


def mhsvm(
    input_channels: int,
    num_classes: int,
    *,
    strides: Sequence[Sequence[int]],
    kernel_sizes: Sequence[Sequence[int]] | None = None,
    features_per_stage: Sequence[int] | None = None,
    base_features: int | None = None,
    depths: int | Sequence[int] = 2,
    decoder_depths: int | Sequence[int] | None = None,
    geometry: str = "native",
    ssm_mode: str = "scan",
    mixer: Mixer = None,
    routes: str | Sequence[str | Sequence[str]] | None = None,
    d_state: int = 16,
    gate_threshold: float = 0.0,
    out_projection: bool = False,
    first_scan_stage: int | None = None,
    drop_path_rate: float = 0.2,
    dt_init: Sequence[float] | Mapping[str, Any] | None = None,
    auxiliary_heads: bool = True,
    deep_supervision: bool = False,
) -> nn.Module:
    """MHS-VM for nnU-Net's plans, in 2D or 3D (as many dimensions as ``strides`` has per stage).

    Args:
        input_channels: image channels.
        num_classes: classes including background; the result are logits.
        strides: per stage and axis, first stage all ones, as in nnU-Net's ``arch_kwargs``. In the faithful geometry
            the second entry is the patch size of the embedding (published: 4) and a stage of blocks follows per entry.
        kernel_sizes: per stage and axis, odd; default 3. A size of 1 keeps an axis out of the convolutions there.
        features_per_stage: widths; default ``base_features`` doubled per stage (native: capped at nnU-Net's 320 in 3D
            and 512 in 2D). In the faithful geometry one entry per stage of blocks, that is ``len(strides) - 1``.
        base_features: width of the first stage; default 32 native, 96 faithful.
        depths: blocks per stage (native: convolution blocks or MHS blocks); a number or one per stage.
        decoder_depths: blocks per decoder level, finest first; default 2 native, (1, 2, 2, ...) faithful as published.
        geometry: "native" or "faithful".
        ssm_mode: "scan", or a control such as "identity". Only what the heads do is replaced: with "identity" a head
            returns its slice, and the gate goes with the scan (equal routes would leave nothing). Both projections
            around the heads, the norms and the block's own gate stay.
        mixer: name of a mixer (:mod:`medmamba.presets`), or a mapping with ``name`` and changed options, whose blocks
            replace the network's own; arguments that describe those
            (routes, d_state, gate_threshold, out_projection) then have no effect.
        routes: one entry per head: a pattern (C snake, X diagonal, S spiral, Z raster), a route set, or a list of
            routes, at least two each. A single name is for four heads alike. Default C, X, S, Z, in 3D along six
            routes each, in 2D along the published four.
        d_state: N, states per channel.
        gate_threshold: of the gate, for the published four routes; rescaled for heads with another number
            (:func:`medmamba.mixers.rescaled_threshold`).
        out_projection: a Linear at the end of the block, as the paper's figure has it and its code has not.
        first_scan_stage: native only; first stage with MHS blocks. Default: the first with at most one token per 4^n
            voxels (stride 4 if isotropic), at the latest the deepest stage.
        drop_path_rate: stochastic depth, rising to this over the encoder and falling to 0 over the decoder.
        dt_init: step sizes of the scans at initialisation: None for Mamba's range, ``(low, high)``, or a mapping with
            ``patch_size`` and ``spacing`` for a range per route (see :mod:`medmamba.mixers.timescale`).
        auxiliary_heads: faithful only; heads for deep supervision. False builds the published network, which has none
            (then ``deep_supervision`` gives a list with the final logits only).
        deep_supervision: return logits of ``len(strides) - 1`` levels, finest first, instead of one tensor.

    Returns:
        a module (B, input_channels, *spatial) -> (B, num_classes, *spatial); the input must be divisible by the
        product of the strides (ValueError otherwise).

    Raises:
        ValueError, KeyError: arguments that contradict each other, more heads than channels, a head with fewer than
            two routes, an unknown geometry, route or ssm_mode.
    """
    ndim = len(total_strides(strides)[0])
    heads = partial(
        MultiHeadCore,
        core=partial(_gated_core, get_core(ssm_mode), d_state=d_state, threshold=gate_threshold),
        routes=routes_of_heads(routes, ndim),
    )
    network = vss_unet(
        input_channels,
        num_classes,
        block=blocks_of(partial(MHSBlock, mixer=heads, has_out_projection=out_projection), mixer, ssm_mode),
        strides=strides,
        kernel_sizes=kernel_sizes,
        features_per_stage=features_per_stage,
        base_features=base_features,
        depths=depths,
        decoder_depths=decoder_depths,
        geometry=geometry,
        first_scan_stage=first_scan_stage,
        drop_path_rate=drop_path_rate,
        auxiliary_heads=auxiliary_heads,
        deep_supervision=deep_supervision,
    )
    initialise_step_sizes(network, dt_init, input_channels=input_channels)
    return network


def routes_of_heads(routes: str | Sequence[str | Sequence[str]] | None, ndim: int) -> list[str | Sequence[str]]:
    """What every head reads: route sets or lists of routes, patterns replaced by the sets of 2 or 3 dimensions.

    Raises:
        ValueError: no head at all.
    """
    patterns = IN_PLANE if ndim == 2 else IN_VOLUME
    chosen = [routes] * _HEADS if isinstance(routes, str) else list(patterns if routes is None else routes)
    if not chosen:
        raise ValueError("routes must have an entry per head, got none; leave it out for the heads C, X, S and Z")
    return [patterns.get(each, each) if isinstance(each, str) else each for each in chosen]


def _gated_core(
    core: Callable[..., nn.Module], width: int, *, routes: str | Sequence[str], threshold: float, **kwargs: Any
) -> nn.Module:
    """The mixer of one head: its routes are told apart by the gate."""
    gate = GatedFusion(rescaled_threshold(threshold, len(resolve_routes(routes))))
    return core(width, routes=routes, fusion=gate, **kwargs)


SPEC = NetworkSpec(
    name="mhsvm",
    build="medmamba.networks.mhsvm.mhsvm",
    paper=Paper(
        title="MHS-VM: Multi-Head Scanning in Parallel Subspaces for Vision Mamba",
        authors="Zhongping Ji",
        year=2024,
        venue="arXiv",
        link="https://arxiv.org/abs/2406.05992",
        dimensions=2,
    ),
    summary="four heads (snakes, diagonals, spirals, rasters), gated by how much a head's routes disagree",
    departures=(
        "2D to 3D: patch operations per axis of the plan; six routes per head (one per fastest axis or slice normal, "
        "and back) instead of four: on one plane these are not the published four, which can be asked for",
        "the gate's threshold is rescaled from four routes to six, and 0 by default (the code has 0.5 for one of its "
        "two datasets, 0 for the other, and 0.4 for all in its test script): 0.5 closes most of the gate at the start",
        "no out-projection, like the code; the paper's figure has one, and so has out_projection = true",
        "native geometry: convolution stages at fine resolution, skips after the stage at every level, nnU-Net widths",
        "a head per level for nnU-Net's deep supervision (the published network has one)",
        "A_log, D, dt bias and norms really excluded from weight decay",
        "routes follow from the size of the input, on any device (the code reads tables for one size, on CUDA only); "
        "every weight stands in the state dict once (the code's holds duplicates)",
        "the routes of a head are compared in float32 also under autocast (the code trains without)",
        "any number of input channels (the original repeats one channel to three); logits without sigmoid",
        "inputs that the strides do not divide are refused (the original crops with a warning)",
    ),
    defaults={
        "depths": 2,
        "d_state": 16,
        "gate_threshold": 0.0,
        "out_projection": False,
        "drop_path_rate": 0.2,
    },
    presets={"small": {"base_features": 16, "depths": 1, "decoder_depths": 1, "d_state": 8, "drop_path_rate": 0.0}},
    block_arguments=("d_state", "gate_threshold", "out_projection", "routes"),
    adamw={"initial_lr": 1e-3, "weight_decay": 1e-2},
)
