"""Several encoders side by side: each sees its own view of a tile, their features are joined along the width."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from mmit.errors import ConfigError
from mmit.models.encoders.tower import VisionEncoder


class FusedTower(nn.Module):
    """Encoders whose features are joined along the width, as in Prismatic VLMs (arXiv 2402.07865, section 4.2).

    The pixels of a tile are the views of all encoders, one below the other (``ImageSpec.views``). Where grids differ,
    features are resampled to the first one's by bilinear interpolation, as in Cambrian-1 (arXiv 2406.16860).
    """

    def __init__(self, towers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.towers = nn.ModuleList(towers)
        first, *others = encoders_of(self)
        self.image = first.image
        self.patches = first.patches
        self.width = sum(encoder.width for encoder in (first, *others))
        for number, encoder in enumerate((first, *others)):
            if encoder.patches != self.patches and not (_is_square(encoder.patches) and _is_square(self.patches)):
                raise ConfigError(
                    f"model.encoder.{number}: its {encoder.patches} features cannot be laid over the {self.patches} of "
                    "the first encoder: both must be square grids, without class tokens (cls: drop)"
                )

    def forward(self, pixels: Tensor) -> Tensor:
        """Patch features (N, P, width) of the normalised views of N tiles, (N, 3, H, W)."""
        features, top = [], 0
        for encoder in encoders_of(self):
            height, width = encoder.image.size
            seen = encoder(pixels[:, :, top : top + height, :width])  # (N, P', D')
            features.append(_on_grid(seen, self.patches))
            top += height
        return torch.cat(features, dim=-1)


def encoders_of(tower: nn.Module) -> tuple[VisionEncoder, ...]:
    """The encoders that a tower consists of: several where they are fused, else the tower itself."""
    parts: list[Any] = list(tower.towers) if isinstance(tower, FusedTower) else [tower]
    return tuple(parts)


def _on_grid(features: Tensor, patches: int) -> Tensor:
    """Features (N, P', D) of a square grid on a square grid of ``patches``: (N, P, D)."""
    if features.shape[1] == patches:
        return features
    old, new = isqrt(features.shape[1]), isqrt(patches)
    square = features.float().transpose(1, 2).unflatten(2, (old, old))  # (N, D, old, old)
    laid = interpolate(square, size=(new, new), mode="bilinear", align_corners=False)
    return laid.flatten(2).transpose(1, 2).to(features.dtype)


def _is_square(patches: int) -> bool:
    return isqrt(patches) ** 2 == patches
