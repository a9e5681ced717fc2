"""Where the published places are in our networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from medmamba.layers import VSSBlock
from medmamba.networks.mhsvm import MHSBlock
from medmamba.networks.unet import UNet
from medmamba.networks.vmunet import FaithfulVMUNet

from .errors import WeightsError
from .published import Place


@dataclass(frozen=True)
class Layout:
    """Where a network of ours keeps the parts of a published one.

    Attributes:
        network: registry name.
        parts: part -> module path with ``{level}`` and ``{block}``; parts that are not there have no entry.
        first_level: number of the stage that is level 0 of the published network.
    """

    network: str
    parts: Mapping[str, str]
    first_level: int

    def key(self, place: Place) -> str | None:
        """Key in the state dict, of a parameter that may or may not exist; None for a part that is not there."""
        if place.part not in self.parts:
            return None
        path = self.parts[place.part].format(level=self.first_level + place.level, block=place.block)
        return f"{path}.{place.name}"


def layout_of(network: nn.Module) -> Layout:
    """Layout of a network in either geometry.

    Raises:
        WeightsError: a network for which no 2D weights were published, or one that is wrapped in another module.
    """
    name = _name(network)
    if isinstance(network, FaithfulVMUNet):
        parts = {
            **_PARTS,
            "embed": "encoder.embed.body.0",
            "final": "decoder.final.body.0",
            "head": "decoder.seg_layers.0",
        }
        return Layout(name, parts, 0)
    if not isinstance(network, UNet):
        raise WeightsError(f"give the network itself, not a {type(network).__name__} around it")
    first = next(i for i, stage in enumerate(network.encoder.stages) if _has_blocks(stage))  # type: ignore[arg-type]
    parts = {**_PARTS, "fuse": "decoder.fuses.{level}.project"}
    if isinstance(network.encoder.stem, nn.Identity):  # the published shape: stage 0 is the image
        parts |= {
            "embed": "encoder.downs.0.body",
            "final": "decoder.ups.0.body.0",
            "head": "decoder.seg_layers.0",
        }
    return Layout(name, parts, first)


_PARTS = {
    "encoder": "encoder.stages.{level}.body.{block}",
    "down": "encoder.downs.{level}.body.0",
    "decoder": "decoder.stages.{level}.body.{block}",
    "up": "decoder.ups.{level}.body.0",
}


def _name(network: nn.Module) -> str:
    for module in network.modules():
        if isinstance(module, MHSBlock):
            return "mhsvm"
        if isinstance(module, VSSBlock):
            return "msvmunet" if module.has_ffn else "vmunet"
    raise WeightsError(
        f"published 2D weights are for mhsvm, msvmunet and vmunet, not for a {type(network).__name__} without their "
        "blocks"
    )


def _has_blocks(stage: nn.Module) -> bool:
    return any(isinstance(module, MHSBlock | VSSBlock) for module in stage.modules())
