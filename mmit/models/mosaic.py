"""From the tokens of tiles to the tokens of images, by the plans that the data side counted with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from mmit.tiling import Mosaic, TilePlan


def lay_out(tiles: Tensor, plans: Sequence[TilePlan], newline: Tensor | None) -> Tensor:
    """The tokens (T, D) of all images in reading order.

    tiles: (N, Q, D), the tiles of the images one after the other, as many as ``plans`` say. newline: (D,), where a
    plan has one.
    """
    if all(plan.mosaic is None and plan.newline == "none" for plan in plans):
        return tiles.flatten(0, 1)
    assert newline is not None, "a plan with newlines belongs to a model that has the token"
    parts = tiles.split([plan.tiles for plan in plans])
    return torch.cat([_image(part, plan, newline) for part, plan in zip(parts, plans, strict=True)])


def _image(tiles: Tensor, plan: TilePlan, newline: Tensor) -> Tensor:
    """The tokens of one image (plan.tokens, D)."""
    if plan.mosaic is None:
        tokens = tiles.flatten(0, 1)
        return torch.cat([tokens, newline[None]]) if plan.newline == "end" else tokens
    behind = plan.mosaic.rows * plan.mosaic.columns
    field = _field(tiles[-behind:], plan.mosaic)
    if plan.newline == "rows":
        field = torch.cat([field, newline.expand(field.shape[0], 1, -1)], dim=1)
    return torch.cat([tiles[:-behind].flatten(0, 1), field.flatten(0, 1)])


def _field(tiles: Tensor, mosaic: Mosaic) -> Tensor:
    """The tokens of a grid of square tiles as they lie beside each other, (height, width, D), cropped and resized."""
    count, tokens, width = tiles.shape
    side = round(tokens**0.5)
    assert count == mosaic.rows * mosaic.columns
    assert side * side == tokens, f"{tokens} tokens of a tile are no square"
    field = tiles.view(mosaic.rows, mosaic.columns, side, side, width).transpose(1, 2)
    field = field.reshape(mosaic.rows * side, mosaic.columns * side, width)
    field = field[mosaic.top :, mosaic.left :][: mosaic.height, : mosaic.width]
    if mosaic.shape == (mosaic.height, mosaic.width):
        return field
    shrunk = functional.interpolate(field.permute(2, 0, 1)[None], size=mosaic.shape, mode="bilinear")[0]
    return shrunk.permute(1, 2, 0)
