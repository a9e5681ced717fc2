"""The names of published weights, and what each of them is.

A tensor is known by its place: a part of the U (embedding, encoder block, merging, ...), a level (0 is the finest
scan stage), a block, and the name that it has in our block. Which parameter of which network of ours that is,
:mod:`medmamba.weights.layout` knows.

Names are those that the released code gives: VMamba (MzeroMiko/VMamba, with the spellings ``ln_1`` and
``self_attention`` of its first release and ``norm`` and ``op`` of the later ones), VM-UNet (JCruan519/VM-UNet),
MSVM-UNet (gndlwch2w/msvm-unet) and MHS-VM (PixDeep/MHS-VM).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .errors import WeightsError


@dataclass(frozen=True)
class Place:
    """What a published tensor is.

    Attributes:
        part: "embed", "encoder", "down", "decoder", "up", "fuse", "final" or "head".
        name: in our module of that part, e.g. ``ss2d.core.x_proj``.
        level: of the scan stage, 0 the finest; of "down" where it starts, of "up" where it ends.
        block: within the stage.
    """

    part: str
    name: str
    level: int = 0
    block: int = 0


@dataclass(frozen=True)
class Naming:
    """How one publication names its weights.

    Attributes:
        name: for reports.
        network: registry name of ours that takes them.
        marks: patterns of names that only this naming has; each matches at least one.
        places: pattern of a name -> part and name of its place. Named groups: ``i`` the level, ``u`` the same counted
            from the bottom, ``v`` from the one above the bottom, ``j`` the block, ``head`` a letter of ``HEADS``; all
            others are put into the name.
        surplus: pattern of a name -> why nothing of ours takes it.
        has_decoder: a whole network; False for an encoder.
    """

    name: str
    network: str
    marks: tuple[str, ...]
    places: Mapping[str, tuple[str, str]]
    surplus: Mapping[str, str]
    has_decoder: bool

    def place_of(self, key: str, last_level: int) -> Place | None:
        """Place of a published name in a network whose deepest level is ``last_level``; None for an unknown name."""
        for pattern, (part, name) in self.places.items():
            match = re.fullmatch(pattern, key)
            if match:
                groups = match.groupdict()
                level = int(groups.get("i") or 0)
                if "u" in groups:
                    level = last_level - int(groups["u"])
                if "v" in groups:
                    level = last_level - 1 - int(groups["v"])
                if "head" in groups:
                    groups["head"] = str(HEADS.index(groups["head"]))
                return Place(part, name.format(**groups), level, int(groups.get("j") or 0))
        return None


#: Patterns of MHS-VM's heads in the order in which they share the channels.
HEADS = "CXSZ"

_W = r"(?P<w>weight|bias)"
_STAGE = r"layers\.(?P<i>\d+)"
_BLOCK = r"blocks\.(?P<j>\d+)\."

_SCAN = {"x_proj_weight": "x_proj", "dt_projs_weight": "dt_proj", "dt_projs_bias": "dt_bias", "A_logs": "A_log"}
_SCAN |= {"Ds": "D"}


def _prefixed(pattern: str, part: str, names: Mapping[str, str], *, inside: str = "") -> dict[str, tuple[str, str]]:
    return {pattern + theirs: (part, inside + ours) for theirs, ours in names.items()}


_VSS = {
    rf"(?:ln_1|norm)\.{_W}": "norm.{w}",
    r"(?:self_attention|op)\.in_proj\.weight": "ss2d.in_proj.weight",
    rf"(?:self_attention|op)\.conv2d\.{_W}": "ss2d.conv.{w}",
    **{rf"(?:self_attention|op)\.{theirs}": f"ss2d.core.{ours}" for theirs, ours in _SCAN.items()},
    rf"(?:self_attention|op)\.out_norm\.{_W}": "ss2d.norm.{w}",
    r"(?:self_attention|op)\.out_proj\.weight": "ss2d.out_proj.weight",
}
_VSS_WITH_MLP = {
    **_VSS,
    rf"norm2\.{_W}": "ffn_norm.{w}",
    rf"mlp\.fc1\.{_W}": "ffn.fc1.{w}",
    rf"mlp\.fc2\.{_W}": "ffn.fc2.{w}",
}
_MSVSS = {
    **_VSS_WITH_MLP,
    r"mlp\.multiscale_conv\.dw_convs\.(?P<k>\d+)\.weight": "ffn.convs.{k}.weight",
}
# The projection before the heads and the weights of every head are registered twice in the released module.
_MHS = {
    rf"ln_1\.{_W}": "norm.{w}",
    r"self_attention\.in_proj\.weight": "in_proj.weight",
    rf"self_attention\.conv2d\.{_W}": "conv.{w}",
    r"self_attention\.mhs\.(?:x_ssproj\.weight|x_ssproj_W)": "mixer.split_proj.weight",
    **{
        rf"self_attention\.mhs\.scanhead_(?P<head>[{HEADS}])\.(?:mambaeng|scanning\.seq2seq_engine)\.{theirs}": (
            f"mixer.heads.{{head}}.{ours}"
        )
        for theirs, ours in _SCAN.items()
    },
    rf"self_attention\.mhs\.cat_norm\.{_W}": "mixer.norm.{w}",
    r"self_attention\.mhs\.y_proj\.weight": "mixer.join_proj.weight",
    rf"self_attention\.out_norm\.{_W}": "out_norm.{w}",
}

_COUNTERS = {r"(?:.+\.)?total_(?:ops|params)": "a counter that a profiler left"}
_CLASSIFIER = {
    rf"(?:classifier\.)?(?:norm|head)\.{_W}": "the classifier's, of which a segmentation network has no counterpart",
    rf"outnorm\d\.{_W}": "the output norm of a detection backbone",
    **_COUNTERS,
}


def _vmamba_encoder(block: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """VMamba's first form: patches of 4 x 4, merging between the stages."""
    return {
        rf"patch_embed\.(?:proj|0)\.{_W}": ("embed", "proj.{w}"),
        rf"patch_embed\.(?:norm|2)\.{_W}": ("embed", "norm.{w}"),
        **_prefixed(rf"{_STAGE}\.{_BLOCK}", "encoder", block),
        rf"{_STAGE}\.downsample\.norm\.{_W}": ("down", "norm.{w}"),
        rf"{_STAGE}\.downsample\.reduction\.weight": ("down", "reduction.weight"),
    }


def _vmunet(block: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    up = r"layers_up\.(?P<u>\d+)"
    return {
        **_vmamba_encoder(block),
        **_prefixed(rf"{up}\.{_BLOCK}", "decoder", block),
        rf"{up}\.upsample\.expand\.weight": ("up", "expand.weight"),
        rf"{up}\.upsample\.norm\.{_W}": ("up", "norm.{w}"),
        r"final_up\.expand\.weight": ("final", "expand.weight"),
        rf"final_up\.norm\.{_W}": ("final", "norm.{w}"),
        rf"final_conv\.{_W}": ("head", "{w}"),
    }


def _vmamba2_encoder(stem: tuple[str, str, str, str], stages: str, down: str) -> dict[str, tuple[str, str]]:
    """VMamba's second form: a stem of two convolutions, strided convolutions between the stages."""
    return {
        **{
            rf"{theirs}\.{_W}": ("embed", f"{ours}.{{w}}")
            for theirs, ours in zip(stem, ("0.proj", "0.norm", "2.proj", "2.norm"), strict=True)
        },
        **_prefixed(rf"{stages}\.{_BLOCK}", "encoder", _VSS_WITH_MLP),
        rf"{down}\.1\.{_W}": ("down", "proj.{w}"),
        rf"{down}\.3\.{_W}": ("down", "norm.{w}"),
    }


def _msvm_encoder(prefix: str) -> dict[str, tuple[str, str]]:
    stem = tuple(rf"{prefix}layer{i}\.{j}" for i in (0, 1) for j in (0, 2))
    return _vmamba2_encoder(
        (stem[0], stem[1], stem[2], stem[3]), rf"{prefix}{_STAGE}", rf"{prefix}downsamples\.(?P<i>\d+)"
    )


def _msvm_decoder() -> dict[str, tuple[str, str]]:
    up = r"decoder\.layers\.(?P<v>\d+)"
    expansion = {
        rf"expand\.0\.{_W}": "conv.{w}",
        r"expand\.1\.(?P<w>weight|bias|running_mean|running_var|num_batches_tracked)": "expand_norm.{w}",
        rf"expand\.3\.{_W}": "depthwise.{w}",
        rf"norm\.{_W}": "norm.{w}",
    }
    return {
        **_prefixed(rf"{up}\.up\.", "up", expansion),
        rf"{up}\.concat_layer\.{_W}": ("fuse", "{w}"),
        **_prefixed(rf"{up}\.vss_layer\.{_BLOCK}", "decoder", _MSVSS),
        **_prefixed(r"decoder\.out_layers\.0\.", "final", expansion),
        rf"decoder\.out_layers\.0\.out\.{_W}": ("head", "{w}"),
    }


#: Tried in this order: a naming whose marks all occur.
NAMINGS = (
    Naming(
        name="MHS-VM",
        network="mhsvm",
        marks=(r"layers_up\..+", r".+\.self_attention\.mhs\..+"),
        places=_vmunet(_MHS),
        surplus=_COUNTERS,
        has_decoder=True,
    ),
    Naming(
        name="VM-UNet",
        network="vmunet",
        marks=(r"layers_up\..+\.(?:self_attention|op)\.A_logs",),
        places=_vmunet(_VSS),
        surplus=_COUNTERS,
        has_decoder=True,
    ),
    Naming(
        name="MSVM-UNet",
        network="msvmunet",
        marks=(r"encoder\.layer0\..+", r"decoder\.layers\..+"),
        places={**_msvm_encoder(r"encoder\."), **_msvm_decoder()},
        surplus=_COUNTERS,
        has_decoder=True,
    ),
    Naming(
        name="MSVM-UNet's encoder",
        network="msvmunet",
        marks=(r"layer0\..+", r"layers\..+\.A_logs"),
        places=_msvm_encoder(""),
        surplus=_COUNTERS,
        has_decoder=False,
    ),
    Naming(
        name="VMamba v2 classifier",
        network="msvmunet",
        marks=(r"patch_embed\.5\..+", r"layers\..+\.A_logs"),
        places=_vmamba2_encoder(
            (r"patch_embed\.0", r"patch_embed\.2", r"patch_embed\.5", r"patch_embed\.7"),
            _STAGE,
            rf"{_STAGE}\.downsample",
        ),
        surplus=_CLASSIFIER,
        has_decoder=False,
    ),
    Naming(
        name="VMamba v0 classifier",
        network="vmunet",
        marks=(r"patch_embed\.(?:proj|0)\..+", r"layers\..+\.A_logs"),
        places=_vmamba_encoder(_VSS),
        surplus=_CLASSIFIER,
        has_decoder=False,
    ),
)
# DataParallel, torch.compile, Lightning, VM-UNet's outer module, detection and segmentation frameworks.
_PREFIXES = ("module.", "_orig_mod.", "_model.", "model.", "net.", "network.", "vmunet.", "backbone.", "encoder.")


@dataclass(frozen=True)
class Published:
    """Recognised weights.

    Attributes:
        naming: whose names they bear.
        tensors: place -> published name and tensor.
        surplus: published name -> why nothing of ours takes it.
        unknown: published names that the naming does not have.
    """

    naming: Naming
    tensors: Mapping[Place, tuple[str, Tensor]]
    surplus: Mapping[str, str]
    unknown: tuple[str, ...]

    @cached_property
    def description(self) -> str:
        """Widths and numbers of blocks of the encoder, in words."""
        widths = {
            p.level: len(t) for p, (_, t) in self.tensors.items() if (p.part, p.name) == ("encoder", "norm.weight")
        }
        depths = dict.fromkeys(sorted(widths), 0)
        for place in self.tensors:
            if place.part == "encoder":
                depths[place.level] = max(depths.get(place.level, 0), place.block + 1)
        listed = ", ".join(str(widths[level]) for level in sorted(widths))
        blocks = ", ".join(str(depths[level]) for level in sorted(depths))
        return f"{self.naming.name} (widths {listed}; blocks {blocks})"


def recognise(weights: Mapping[str, Tensor]) -> Published:
    """Find out whose weights these are, and what each of them is.

    Args:
        weights: names and tensors, as :func:`medmamba.weights.read_checkpoint` gives them; prefixes that all names
            share, such as ``module.``, are taken off.

    Raises:
        WeightsError: names of no publication known here, or one tensor under two names with two values.
    """
    weights = _without_prefixes(weights)
    for naming in NAMINGS:
        if all(any(re.fullmatch(mark, key) for key in weights) for mark in naming.marks):
            return _placed(naming, weights)
    first = ", ".join(list(weights)[:5])
    known = ", ".join(naming.name for naming in NAMINGS)
    raise WeightsError(
        f"these are no weights of a known 2D network: their names begin with {first or '(none)'}; known are those of "
        f"{known}; weights of nnU-Net or of medmamba need no conversion: give them to -pretrained_weights"
    )


def _without_prefixes(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    stripped = dict(weights)
    while True:
        # A profiler's counters of the outermost module lie outside of what was wrapped.
        named = [key for key in stripped if not re.fullmatch(r"total_(?:ops|params)", key)]
        shared = [prefix for prefix in _PREFIXES if named and all(key.startswith(prefix) for key in named)]
        if not shared:
            return stripped
        stripped = {key.removeprefix(shared[0]): value for key, value in stripped.items()}


def _placed(naming: Naming, weights: Mapping[str, Tensor]) -> Published:
    levels = [int(match[1]) for key in weights if (match := re.match(r"(?:encoder\.)?layers\.(\d+)\.", key))]
    tensors: dict[Place, tuple[str, Tensor]] = {}
    surplus: dict[str, str] = {}
    unknown = []
    for key, tensor in weights.items():
        place = naming.place_of(key, max(levels, default=0))
        reasons = [reason for pattern, reason in naming.surplus.items() if re.fullmatch(pattern, key)]
        if place is None and reasons:
            surplus[key] = reasons[0]
        elif place is None:
            unknown.append(key)
        elif place not in tensors:
            tensors[place] = (key, tensor)
        elif torch.equal(tensors[place][1], tensor):
            surplus[key] = "the same tensor under a second name"
        else:
            raise WeightsError(
                f"{tensors[place][0]} and {key} are two names of one tensor of {naming.name} and differ here; "
                "the file was changed after it was saved"
            )
    return Published(naming, tensors, surplus, tuple(unknown))
