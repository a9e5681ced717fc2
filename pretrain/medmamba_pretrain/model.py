"""An encoder with what it takes to pretrain it: the fills behind it, a decoder and the loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .decoder import ReconstructionDecoder, scales_of
from .fill import GatedTOKI, PaperTOKI, TokenFill, get_fill
from .loss import reconstruction_loss
from .masking import MaskedEncoder, fill_masked, unit_grid
from .objectives import get_objective
from .recipe import Recipe


class Pretraining(nn.Module):
    """Masked encoder, fill per scale, decoder.

    Every parameter gets a gradient in every step, as DistributedDataParallel wants it.

    Args:
        network: a module with ``encoder`` and ``total_stride``; nothing else of it is used.
        recipe: objective, fill and decoder.
        image_channels: of the image.

    Attributes:
        encoder: :class:`.masking.MaskedEncoder`; ``encoder.encoder`` is that of the network.
        units: of a patch, per axis.

    Raises:
        ValueError: a network that cannot run under a mask, or a patch that does not fit its strides.
    """

    def __init__(self, network: Any, recipe: Recipe, image_channels: int = 1):
        super().__init__()
        objective = get_objective(recipe.objective)
        self.encoder = MaskedEncoder(network.encoder, network.total_stride)
        self.units = unit_grid(recipe.patch_size, network.total_stride)
        channels, strides = scales_of(network.encoder, network.total_stride, image_channels)
        self.decoder = ReconstructionDecoder(
            channels,
            strides,
            image_channels,
            share=recipe.decoder_share,
            finest=recipe.decoder_finest,
            reads_all_scales=objective.reads_all_scales,
        )
        coarsest = len(channels) - 1
        self.fills = nn.ModuleList(
            _coarsest_fill(recipe, channels[i]) if i == coarsest else TokenFill(channels[i]) for i in self.decoder.reads
        )

    @property
    def fill(self) -> nn.Module:
        """The fill of the coarsest scale."""
        return self.fills[-1]

    def predict(self, image: Tensor, visible: Tensor) -> Tensor:
        """The normalised units of an image from those that are visible.

        Args:
            image: (B, C, *spatial); masked voxels are never read.
            visible: (B, *units) bool.

        Returns:
            (B, C, *spatial), of :func:`.loss.normalised_units`.
        """
        masked = self.encoder(image, visible)
        filled = [
            fill_masked(fill, masked.features[i], masked.visible[i])
            for fill, i in zip(self.fills, self.decoder.reads, strict=True)
        ]
        prediction: Tensor = self.decoder(filled)
        return prediction

    def forward(self, image: Tensor, visible: Tensor, target: Tensor, count: int) -> Tensor:
        """Loss of one batch.

        Args:
            image: (B, C, *spatial).
            visible: (B, *units) bool.
            target: (B, *units) bool, units to predict.
            count: number of units to divide by; that of all batches of all processes in a step.

        Returns:
            a scalar, in float32 or float64.
        """
        return self.loss(self.predict(image, visible), image, target, count)

    @staticmethod
    def loss(prediction: Tensor, image: Tensor, target: Tensor, count: int) -> Tensor:
        """Squared error of the target units, averaged over their voxels and divided by ``count``."""
        return reconstruction_loss(prediction, image, ~target, masked_units=count)


def _coarsest_fill(recipe: Recipe, width: int) -> nn.Module:
    name = recipe.fill or get_objective(recipe.objective).fill
    build = get_fill(name)
    if name == "token":
        return build(width)
    return build(width, routes=list(recipe.fill_routes), ends=recipe.fill_ends)


def decay_statistics(fill: nn.Module) -> dict[str, float]:
    """What a fill has learned about how fast a token fades along a gap; empty for fills that learn no such thing."""
    if isinstance(fill, PaperTOKI):
        return {"spectral_radius": float(fill.spectral_radius())}
    if isinstance(fill, GatedTOKI):
        decay = fill.decay.detach()
        return {"mean": float(decay.mean()), "min": float(decay.min()), "max": float(decay.max())}
    return {}
