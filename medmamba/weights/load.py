"""Loading published weights into a network of ours: everything, or an error that says what would be left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .errors import WeightsError
from .inflate import NoCounterpartError, Rule, Step, channels_of_image, rules_of
from .layout import Layout, layout_of
from .published import Place, Published, recognise
from .report import Report

_HEADS = ".seg_layers."


def load_published(
    network: nn.Module, weights: Mapping[str, Tensor], *, mirror_decoder: bool = False, allow_partial: bool = False
) -> Report:
    """Load weights of a published 2D network into one of ours, inflated where ours is 3D.

    The weights of a whole network must fill everything but the heads, and all of them must find a place; those of an
    encoder must fill the encoder, and blocks that a shallower network does not have are left out, as VM-UNet does. A
    head is taken where the number of classes is the same and keeps its initial values otherwise.

    Args:
        network: of :func:`medmamba.networks.create_network`, in 2D or 3D; changed in place.
        weights: published names and tensors of any float dtype, see :func:`medmamba.weights.read_checkpoint`.
        mirror_decoder: with the weights of VMamba's first form, start the blocks of the decoder like those of the
            encoder at the same level, as VM-UNet does.
        allow_partial: load what fits, and report the rest, where a strict load would be refused. The native geometry
            needs it: its convolution stages have no counterpart.

    Returns:
        what became of every tensor of either side.

    Raises:
        WeightsError: unknown names, weights of another network, shapes that differ, tensors without a place on either
            side, values that are not finite, or nothing loaded at all. The network is then as it was.
    """
    published, layout = recognise(weights), layout_of(network)
    if published.naming.network != layout.network:
        raise WeightsError(
            f"these are weights of {published.naming.name}, which {published.naming.network} takes, not "
            f"{layout.network}; build that network, or give other weights"
        )
    state = network.state_dict()
    match = _Match(state, layout, rules_of(network), published)
    for place, (name, value) in published.tensors.items():
        match.take(place, name, value)
    if mirror_decoder:
        _mirror(match)
    report = match.report()
    if not match.values:
        raise WeightsError(
            f"nothing of {published.description} fits this network; {_because(match.misfits) or _remedy(published)}"
        )
    if not allow_partial:
        _require_all(match, report)
    with torch.no_grad():
        for key, value in match.values.items():
            state[key].copy_(value)
    return report


@dataclass
class _Match:
    """What was found so far. ``misfits`` holds what a strict load does not accept, one reason per tensor of ours or
    theirs."""

    state: Mapping[str, Tensor]
    layout: Layout
    rules: Mapping[str, Rule]
    published: Published
    values: dict[str, Tensor] = field(default_factory=dict)
    loaded: dict[str, str] = field(default_factory=dict)
    adapted: dict[str, tuple[str, str]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    misfits: dict[str, str] = field(default_factory=dict)

    def take(self, place: Place, name: str, value: Tensor) -> None:
        """Find the parameter of a place and load it, or note why not."""
        key = self.layout.key(place)
        if key is None or key not in self.state:
            self.unused[name] = self._why_without_place(place)
            if not _may_be_left(place, self.published):
                self.misfits[name] = self.unused[name]
            return
        target = self.state[key]
        if place.part == "head" and len(value) != len(target):
            reason = f"a head of other classes: {len(value)} published, {len(target)} here"
            self.unused[name], self.missing[key] = reason, reason
            return
        rule = self.rules.get(key, ())
        if isinstance(rule, NoCounterpartError):
            self._refuse(key, name, str(rule))
            return
        steps = [*self._image_channels(place, value, target), *rule]
        shape, value = tuple(value.shape), value.to(target.dtype)
        for step in steps:
            value = step.apply(value)
        if _without_ones(value.shape) != _without_ones(target.shape):
            self._refuse(key, name, f"shape {tuple(target.shape)} here, {shape} in the checkpoint")
            return
        if not bool(value.isfinite().all()):
            raise WeightsError(f"{name} holds values that are not finite; the file is damaged or the training failed")
        self.values[key] = value.reshape(target.shape)
        how = ", ".join(step.how for step in steps if step.how)
        if how:
            self.adapted[key] = (name, how)
        else:
            self.loaded[key] = name

    def report(self) -> Report:
        """Complete the lists of what is left over on either side."""
        for key in self.state:
            if key in self.values or key in self.missing:
                continue
            if _HEADS in key:
                self.missing[key] = "a head that was not published"
            elif not self.published.naming.has_decoder and not key.startswith("encoder."):
                self.missing[key] = "a decoder, and the checkpoint is an encoder"
            else:
                self.missing[key] = "not in the checkpoint"
                self.misfits[key] = self.missing[key]
        self.unused.update(self.published.surplus)
        for name in self.published.unknown:
            self.unused[name] = f"no name of {self.published.naming.name}"
            self.misfits[name] = self.unused[name]
        return Report(
            source=self.published.description,
            network=self.layout.network,
            loaded=self.loaded,
            adapted=self.adapted,
            missing=self.missing,
            unused=self.unused,
        )

    def _refuse(self, key: str, name: str, reason: str) -> None:
        self.missing[key] = self.unused[name] = self.misfits[key] = reason

    def _image_channels(self, place: Place, value: Tensor, target: Tensor) -> list[Step]:
        is_first = place.part == "embed" and place.name in ("proj.weight", "0.proj.weight")
        return channels_of_image(target.shape[1], value.shape[1]) if is_first and value.dim() > 1 else []

    def _why_without_place(self, place: Place) -> str:
        if place.name.startswith("expand_norm."):
            return "running statistics of a BatchNorm; expand_norm='batch' has them, the default InstanceNorm none"
        if place.part in ("encoder", "decoder"):
            return "a block or parameter that this network does not have"
        return f"the network has no such {_PARTS[place.part]}"


_PARTS = {
    "embed": "embedding",
    "down": "downsampling",
    "up": "upsampling",
    "fuse": "projection after a skip",
    "final": "expansion to full resolution",
    "head": "head",
}


def _mirror(match: _Match) -> None:
    published = match.published
    if published.naming.has_decoder or published.naming.network != "vmunet":
        raise WeightsError(
            "a mirrored decoder is for the encoder of VM-UNet (VMamba v0 classifier), not for "
            f"{published.naming.name}; leave mirror_decoder (--mirror-decoder) out"
        )
    for place, (name, value) in published.tensors.items():
        mirrored = Place("decoder", place.name, place.level, place.block)
        if place.part == "encoder" and match.layout.key(mirrored) in match.state:
            match.take(mirrored, name, value)


def _may_be_left(place: Place, published: Published) -> bool:
    """Whether a published tensor without a place with us may be left out of a strict load."""
    if place.name.startswith("expand_norm."):
        return True
    return not published.naming.has_decoder


def _require_all(match: _Match, report: Report) -> None:
    if match.misfits:
        raise WeightsError(
            f"{report.source} would be loaded in part only: {_because(match.misfits)}; {_remedy(match.published)}, or "
            "allow a partial load (allow_partial=True, --allow-partial)"
        )


def _because(misfits: Mapping[str, str]) -> str:
    """The first of each reason, and how many there are."""
    groups: dict[str, list[str]] = {}
    for key, reason in misfits.items():
        groups.setdefault(reason, []).append(key)
    texts = [
        f"{keys[0]}{f' and {len(keys) - 1} more' if len(keys) > 1 else ''} ({reason})"
        for reason, keys in groups.items()
    ]
    return "; ".join([*texts[:3], *([f"{len(texts) - 3} other reasons"] if len(texts) > 3 else [])])


def _remedy(published: Published) -> str:
    return f"build {published.naming.network} with geometry='faithful' and these widths, blocks and published routes"


def _without_ones(shape: torch.Size) -> list[int]:
    return [size for size in shape if size != 1]
