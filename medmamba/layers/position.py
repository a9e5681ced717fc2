"""Fixed position codes for tokens of a grid of any size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_TEMPERATURE = 10000.0


class SinCosPosition(nn.Module):
    """Adds sines and cosines of the position along every axis. (B, *spatial, C) -> same.

    For n axes, m = floor(C / 2n) and w_i = 10000^(-i / m), the channels are, axis by axis, sin(p w_0) ...
    sin(p w_(m-1)), cos(p w_0) ... cos(p w_(m-1)), with p the voxel's index on that axis; channels that are left over
    get nothing. No parameters: the code is made for the grid at hand, so weights do not depend on the patch size.

    Source: the table of MambaMIM's network (Tang et al., "MambaMIM", 2024, arXiv:2408.08070), which stores it for one
    grid as a frozen parameter; the one-dimensional form is that of Vaswani et al., 2017, arXiv:1706.03762, section 3.5.
    """

    def forward(self, x: Tensor) -> Tensor:
        _, *spatial, channels = x.shape
        per_axis = channels // (2 * len(spatial))
        if per_axis == 0:
            return x
        steps = torch.arange(per_axis, device=x.device, dtype=torch.float32) / per_axis
        frequencies = _TEMPERATURE**-steps
        codes = []
        for axis, size in enumerate(spatial):
            angles = torch.arange(size, device=x.device, dtype=torch.float32).unsqueeze(-1) * frequencies
            code = torch.cat([angles.sin(), angles.cos()], dim=-1)
            shape = [size if other == axis else 1 for other in range(len(spatial))]
            codes.append(code.view(*shape, -1).expand(*spatial, -1))
        used = 2 * per_axis * len(spatial)
        rest = x.new_zeros(*spatial, channels - used, dtype=torch.float32)
        return x + torch.cat([*codes, rest], dim=-1).to(x.dtype)
