"""From an image to labels, as nnU-Net predicts, in one process and with a bound on memory.

nnU-Net's own preprocessing runs in process. Sliding window and export are written anew as one stream along the first
axis: logits exist for the slab of one row of tiles only, and not for the volume. Numbers are nnU-Net's, with sums in
float32 in place of float16.
"""

from __future__ import annotations

from .model_predictor import ModelPredictor

__all__ = ["ModelPredictor"]
