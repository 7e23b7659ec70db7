"""Tiling: how many tiles an image of some size is cut into, and how their tokens become the image's tokens.

Arithmetic alone, from the size in the header; the pixels are cut by images.py, the tokens put together by
models/mosaic.py. Sizes here are (width, height) in pixels, as people and LLaVA write them; rows come before columns
where tiles or tokens are counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, Literal

from mmit.errors import ConfigError

MOST_TILES = 1024
"""Of one image: more is a slip of the pen, which would fill the memory."""

Newline = Literal["none", "rows", "end"]
"""Where newline tokens stand: nowhere, behind each row of the mosaic, or once, behind the image."""


@dataclass(frozen=True)
class Mosaic:
    """The last ``rows * columns`` tiles of an image as one field of tokens.

    top, left, height, width: the part of the field that is no padding, in tokens. shape: (height, width) that it is
    resized to, its own where it is not.
    """

    rows: int
    columns: int
    top: int
    left: int
    height: int
    width: int
    shape: tuple[int, int]


@dataclass(frozen=True)
class TilePlan:
    """What one image costs, and how its tokens are put together.

    tiles: through the encoder; the first ones stand as they are, one after the other, and a ``mosaic`` takes the last
    ones. tokens: in the language model, newlines included.
    """

    tiles: int
    tokens: int
    mosaic: Mosaic | None = None
    newline: Newline = "none"


@dataclass(frozen=True, kw_only=True)
class Anyres:
    """The whole image as one tile, then a grid of tiles that fits its shape (LLaVA-NeXT).

    pinpoints: the (width, height) in pixels of the grids to choose from; among equally good ones the first wins.
    unpad: the grid's tokens lie as one field, without the rows and columns that only see padding, and a learned
        newline token ends each row; False: the tokens of the tiles, one tile after the other.
    shrink_to: the field is resized to about the tokens of so many tiles where it has more (LLaVA-OneVision's
        ``anyres_max_9``); 0: never.
    several: whether each of several images of a sample is ``tiled``, or each is a single tile (``whole``).
    """

    pinpoints: tuple[tuple[int, int], ...]
    unpad: bool = True
    shrink_to: int = 0
    several: Literal["tiled", "whole"] = "tiled"

    def __post_init__(self) -> None:
        if not self.pinpoints or any(len(pair) != 2 or min(pair) < 1 for pair in self.pinpoints):
            raise ConfigError(f"tiling pinpoints {list(self.pinpoints)} must be pairs of (width, height) in pixels")
        if self.shrink_to < 0 or (self.shrink_to and not self.unpad):
            raise ConfigError(f"tiling shrink_to is {self.shrink_to}; it is 0 or above, and above 0 only with unpad")

    def check(self, tile: tuple[int, int], tokens_per_tile: int) -> None:
        """Raise ConfigError where tiles of (width, height) pixels do not fill the grids, or cannot be unpadded."""
        for width, height in self.pinpoints:
            if width % tile[0] or height % tile[1]:
                raise ConfigError(
                    f"tiling pinpoint {width} x {height} is not whole tiles of {tile[0]} x {tile[1]} pixels"
                )
            if (tiles := (width // tile[0]) * (height // tile[1])) > MOST_TILES:
                raise ConfigError(f"tiling pinpoint {width} x {height} is {tiles} tiles; take at most {MOST_TILES}")
        if self.unpad and (tile[0] != tile[1] or math.isqrt(tokens_per_tile) ** 2 != tokens_per_tile):
            raise ConfigError(
                f"tiling unpad needs square tiles and a square number of tokens in each, not {tile[0]} x {tile[1]} "
                f"pixels and {tokens_per_tile} tokens; set unpad to false, or drop the class token"
            )

    def cuts(self, images: int) -> bool:
        """False where the ``images`` of a sample are a single tile each."""
        return images == 1 or self.several == "tiled"

    def grid(self, size: tuple[int, int], tile: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of tiles for an image of ``size``."""
        width, height = self.best(size)
        return height // tile[1], width // tile[0]

    def best(self, size: tuple[int, int]) -> tuple[int, int]:
        """The pinpoint that keeps most of the image's pixels, and of those the one that wastes least."""
        width, height = size
        most, least = 0, math.inf
        found = self.pinpoints[0]
        for across, down in self.pinpoints:
            scale = min(across / width, down / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            wasted = across * down - kept
            if kept > most or (kept == most and wasted < least):
                most, least, found = kept, wasted, (across, down)
        return found

    def plan(self, size: tuple[int, int], *, tile: tuple[int, int], tokens_per_tile: int, images: int) -> TilePlan:
        """The plan of an image of ``size`` that is one of ``images`` in its sample."""
        if not self.cuts(images):
            return TilePlan(1, tokens_per_tile + self.unpad, newline="end" if self.unpad else "none")
        rows, columns = self.grid(size, tile)
        tiles = 1 + rows * columns
        if not self.unpad:
            return TilePlan(tiles, tiles * tokens_per_tile)
        side = math.isqrt(tokens_per_tile)
        top, left = _padding(size, rows * side, columns * side)
        height, width = rows * side - 2 * top, columns * side - 2 * left
        shape = self._shrunk(height, width, side)
        tokens = tokens_per_tile + shape[0] * (shape[1] + 1)
        return TilePlan(tiles, tokens, Mosaic(rows, columns, top, left, height, width, shape), "rows")

    def _shrunk(self, height: int, width: int, side: int) -> tuple[int, int]:
        if not self.shrink_to:
            return height, width
        ratio = math.sqrt(height * width / (self.shrink_to * side**2))
        # transformers' threshold (modeling_llava_onevision.py): a little too many tokens are left as they are
        return (int(height // ratio), int(width // ratio)) if ratio > 1.1 else (height, width)


@dataclass(frozen=True, kw_only=True)
class Dynamic:
    """A grid of tiles whose shape is nearest to the image's, squashed into it, then the whole image (InternVL 1.5).

    min_tiles, max_tiles: of the grid. thumbnail: the whole image as a last tile, where the grid has more than one.
    """

    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise ConfigError(f"tiling min_tiles is {self.min_tiles} and max_tiles {self.max_tiles}; 1 <= min <= max")
        if self.max_tiles > MOST_TILES:
            raise ConfigError(f"tiling max_tiles is {self.max_tiles}; take at most {MOST_TILES}")

    def grid(self, size: tuple[int, int], tile: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of tiles for an image of ``size``.

        Of grids equally near in shape the larger wins while the image has more than half of its pixels.
        """
        width, height = size
        nearest, found = math.inf, (1, 1)
        for columns, rows in _grids(self.min_tiles, self.max_tiles):
            distance = abs(width / height - columns / rows)
            is_tie = distance == nearest and width * height > 0.5 * tile[0] * tile[1] * columns * rows
            if distance < nearest or is_tie:
                nearest, found = distance, (rows, columns)
        return found

    def plan(self, size: tuple[int, int], *, tile: tuple[int, int], tokens_per_tile: int) -> TilePlan:
        """The plan of an image of ``size``."""
        tiles = math.prod(self.grid(size, tile))
        tiles += self.thumbnail and tiles > 1
        return TilePlan(tiles, tiles * tokens_per_tile)


Tiling = Anyres | Dynamic

_TYPES: Mapping[str, type[Anyres | Dynamic]] = {"anyres": Anyres, "dynamic": Dynamic}


def tiling_to_dict(tiling: Tiling) -> dict[str, Any]:
    """Plain values for JSON; ``tiling_from_dict`` reads them back."""
    kind = next(name for name, cls in _TYPES.items() if isinstance(tiling, cls))
    values = asdict(tiling)
    if isinstance(tiling, Anyres):
        values["pinpoints"] = [list(pair) for pair in tiling.pinpoints]
    return {"type": kind, **values}


def tiling_from_dict(values: Mapping[str, Any]) -> Tiling:
    """The tiling that ``tiling_to_dict`` wrote. Raises ConfigError."""
    rest = dict(values)
    cls = _TYPES.get(rest.pop("type", ""))
    if cls is None or not set(rest) <= {field.name for field in fields(cls)}:
        raise ConfigError(f"tiling {dict(values)} is not one that this version knows ({', '.join(_TYPES)})")
    if "pinpoints" in rest:
        rest["pinpoints"] = tuple((int(width), int(height)) for width, height in rest["pinpoints"])
    return cls(**rest)


@lru_cache(maxsize=16)
def _grids(fewest: int, most: int) -> list[tuple[int, int]]:
    """(columns, rows) of all grids of so many tiles, the smaller ones first."""
    grids = ((c, r) for c in range(1, most + 1) for r in range(1, most // c + 1))
    return sorted((grid for grid in grids if fewest <= math.prod(grid)), key=math.prod)


def _padding(size: tuple[int, int], rows: int, columns: int) -> tuple[int, int]:
    """Rows above (and below) and columns left (and right) of a field of tokens that only see padding.

    Rounded as LLaVA-NeXT and transformers do it, down to whole tokens.
    """
    width, height = size
    if width / height > columns / rows:
        return (rows - int(round(height * (columns / width), 7))) // 2, 0
    return 0, (columns - int(round(width * (rows / height), 7))) // 2
