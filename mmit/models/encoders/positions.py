"""Position embeddings of a vision transformer for another input size."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def resample_positions(table: Tensor, *, prefix: int, grid: tuple[int, int]) -> Tensor:
    """The position embeddings of a square grid of patches, resampled to another grid.

    table: (..., prefix + P, D), row-major; the first ``prefix`` rows (class token) stay. Bicubic with antialiasing in
    float32, as timm and open_clip resample; the idea is that of ViT (arXiv 2010.11929, section 3.2).
    """
    rows = table.reshape(-1, table.shape[-1])
    side = isqrt(rows.shape[0] - prefix)
    assert side * side == rows.shape[0] - prefix, "only towers with a square grid are resampled"
    if (side, side) == grid:
        return table
    old = rows[prefix:].detach().float().view(1, side, side, -1).permute(0, 3, 1, 2)  # (1, D, side, side)
    new = interpolate(old, size=grid, mode="bicubic", antialias=True, align_corners=False)
    patches = new.permute(0, 2, 3, 1).reshape(grid[0] * grid[1], -1).to(table.dtype)
    return torch.cat([rows[:prefix].detach(), patches]).view(*table.shape[:-2], -1, table.shape[-1])
