"""Patches as a square grid: the side of it, and the average over regions of it."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

from mmit.errors import ConfigError


def side_of(count: int, *, what: str) -> int:
    """The side of a square grid of ``count`` patches; raises ConfigError, naming ``what`` needs one, for no square."""
    side = isqrt(count)
    if side * side != count:
        hint = "; set model.encoder.cls to drop" if isqrt(count - 1) ** 2 == count - 1 else ""
        raise ConfigError(f"model.connector: {what} needs a square grid of patches, the encoder gives {count}{hint}")
    return side


def as_grid(patches: Tensor, *, what: str) -> Tensor:
    """Patches (N, P, D) as a grid (N, S, S, D), rows first."""
    side = side_of(patches.shape[1], what=what)
    return patches.unflatten(1, (side, side))


def average(grid: Tensor, side: int) -> Tensor:
    """Averages over ``side`` x ``side`` regions of a grid (N, S, S, D): (N, side, side, D).

    The regions of torch's adaptive average pooling, which overlap where ``side`` does not divide S. As two products
    with a small matrix, since pooling has no deterministic gradient on CUDA.
    """
    weights = _regions(grid.shape[1], side, device=grid.device).to(grid.dtype)
    return torch.einsum("ai,bj,nijd->nabd", weights, weights, grid)


def _regions(size: int, count: int, *, device: torch.device) -> Tensor:
    """(count, size): the share of each of ``size`` places in each of ``count`` regions."""
    region = torch.arange(count, device=device)
    start = region * size // count
    end = ((region + 1) * size + count - 1) // count
    place = torch.arange(size, device=device)
    inside = (place >= start[:, None]) & (place < end[:, None])  # (count, size)
    return inside / (end - start)[:, None]
