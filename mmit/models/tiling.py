"""From the ``model.tiling`` section to a tiling, and the newline token that some tilings put between rows."""

from __future__ import annotations

import math

import torch
from torch import nn

from mmit.config import ComposedModel, DynamicTiling
from mmit.errors import ConfigError
from mmit.models.connectors import Connector, keeps_grid
from mmit.tiling import Anyres, Dynamic, Tiling

GRIDS = {
    "llava_next": ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)),
    "onevision": tuple((columns, rows) for columns in range(1, 7) for rows in range(1, 7)),
}
"""(columns, rows) of the grids that go by a name, in the order in which LLaVA's code lists them."""


def tiling_of(section: ComposedModel, size: tuple[int, int], connector: Connector) -> Tiling | None:
    """How the pictures of a model composed of these parts are cut; size: (H, W) of a tile.

    Raises ConfigError where pictures are to be unpadded and the connector's tokens are no picture of the patches.
    """
    tiling = section.tiling
    if isinstance(tiling, DynamicTiling):
        return Dynamic(min_tiles=tiling.min_tiles, max_tiles=tiling.max_tiles, thumbnail=tiling.thumbnail)
    if tiling is None:
        return None
    if tiling.unpad and not keeps_grid(connector):
        raise ConfigError(
            f"model.tiling.unpad: the image tokens of {type(connector).__name__} do not lie as a grid over the tile, "
            "so that those of padding cannot be told; set unpad to false"
        )
    pinpoints = tiling.pinpoints
    if isinstance(pinpoints, str):
        height, width = size
        pinpoints = [(columns * width, rows * height) for columns, rows in GRIDS[pinpoints]]
    return Anyres(pinpoints=tuple(pinpoints), unpad=tiling.unpad, shrink_to=tiling.shrink_to, several=tiling.several)


def fresh_newline(width: int, *, seed: int, dtype: torch.dtype) -> nn.Parameter:
    """The token that ends a row of a picture, (D,), as LLaVA-NeXT begins: normal, of standard deviation 1 / sqrt(D)."""
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter((torch.randn(width, generator=generator) / math.sqrt(width)).to(dtype))
