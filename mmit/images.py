"""Images: from the encoded bytes of a record to uint8 tiles for the encoder, and their size from the header alone.

The flow is decode -> upright RGB -> resize to a tile -> (N, 3, H, W) uint8; ``normalize`` makes floats of it on the
device of the model. How many image tokens a picture costs is known from its size (``ImageSpec.plan``), so planning a
run decodes nothing.

The default route resizes with torch; ``exact=True`` resizes with PIL, bit for bit as LLaVA does (see resize.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from mmit.errors import ConfigError, DataError
from mmit.image_files import DEFAULT_MAX_PIXELS, HARD_MAX_PIXELS, decode, read_size
from mmit.resize import WITH_PIL, WITH_TORCH, Resize
from mmit.tiling import Anyres, TilePlan, Tiling, tiling_from_dict, tiling_to_dict

__all__ = ["DEFAULT_MAX_PIXELS", "ImageSpec", "View", "normalize", "read_size"]

Alpha = Literal["white", "black", "mean"]
Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class View:
    """How one encoder sees a tile: size (H, W) in pixels, mean and std of pixels in 0..1, manner of resizing."""

    size: Size
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: Resize

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ConfigError(f"image size {self.size} must be two numbers of pixels above 0")
        if self.resize not in ("pad", "squash", "crop"):
            raise ConfigError(f"image resize '{self.resize}' is none of pad, squash, crop")
        if min(self.std) <= 0:
            raise ConfigError(f"image std {self.std} must be above 0")

    @property
    def fill(self) -> tuple[int, int, int]:
        """The mean colour as LLaVA rounds it: down."""
        red, green, blue = (int(channel * 255) for channel in self.mean)
        return red, green, blue


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """How an image becomes tiles; a property of the encoder and the connector, kept in every model directory.

    size: (H, W) of a tile in pixels.
    mean, std: per channel, of pixels in 0..1.
    resize: ``pad`` to the tile's shape with the mean colour (LLaVA 1.5), ``squash`` (SigLIP), or ``crop``: shortest
        edge, then the centre (CLIP). An image that is cut into tiles is resized as its tiling does.
    tokens_per_tile: image tokens that the language model sees for one tile, after the connector.
    exact: resize with PIL, bit for bit as LLaVA does.
    alpha: the colour behind transparent pixels.
    max_pixels: an image with more, by its header, is refused.
    views: how further encoders see the tile, where several are fused; their pixels lie below the first one's.
    draft: let the JPEG decoder itself make a large photo 1/2, 1/4 or 1/8 as large, where it stays at least as large as
        it is drawn and in its place (``resize.draft_scale``): faster, colours about half a grey level off on average.
    tiling: how an image is cut into several tiles; None: it is one.
    """

    size: Size
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: Resize
    tokens_per_tile: int
    exact: bool = False
    alpha: Alpha = "white"
    max_pixels: int = DEFAULT_MAX_PIXELS
    views: tuple[View, ...] = ()
    draft: bool = False
    tiling: Tiling | None = None

    def __post_init__(self) -> None:
        View(size=self.size, mean=self.mean, std=self.std, resize=self.resize)  # raises what is wrong with them
        if self.alpha not in ("white", "black", "mean"):
            raise ConfigError(f"image alpha '{self.alpha}' is none of white, black, mean")
        if self.tokens_per_tile < 1:
            raise ConfigError(f"tokens_per_tile is {self.tokens_per_tile}; an image needs at least one token")
        if self.draft and self.exact:
            raise ConfigError("draft decodes a JPEG to other pixels than exact resizing is for; set only one of them")
        if self.draft and self.tiling is not None:
            raise ConfigError("draft gives up the detail that tiling is for; set only one of them")
        if not 1 <= self.max_pixels <= HARD_MAX_PIXELS:
            raise ConfigError(f"max_pixels is {self.max_pixels}; choose 1 to {HARD_MAX_PIXELS}, PIL's own bound")
        if isinstance(self.tiling, Anyres):
            self.tiling.check(self._tile, self.tokens_per_tile)

    def plan(self, width: int, height: int, *, images: int = 1) -> TilePlan:
        """What an image of this displayed size costs and how its tokens lie, known without decoding it.

        images: of the sample it belongs to; some tilings cut a picture only where it is alone.
        """
        if width < 1 or height < 1:
            raise DataError(f"an image of {width} x {height} pixels has no content")
        q = self.tokens_per_tile
        if self.tiling is None:
            return TilePlan(tiles=1, tokens=q)
        if isinstance(self.tiling, Anyres):
            return self.tiling.plan((width, height), tile=self._tile, tokens_per_tile=q, images=images)
        return self.tiling.plan((width, height), tile=self._tile, tokens_per_tile=q)

    def prepare(self, data: bytes, *, images: int = 1) -> Tensor:
        """The tiles of an encoded image, as ``plan`` counts them: (N, 3, H, W) uint8; (H, W) is ``canvas``.

        Raises DataError with the reason if ``data`` is no image, is damaged, or is larger than ``max_pixels``.
        """
        behind = {"white": (255, 255, 255), "black": (0, 0, 0), "mean": self.fill}[self.alpha]
        tiles = [(view.size, view.resize) for view in self.all_views]
        image = decode(data, max_pixels=self.max_pixels, behind=behind, drawn_into=tiles if self.draft else ())
        seen = [self._seen(image, view, self._grid(image.size, images)) for view in self.all_views]
        if len(seen) == 1:
            return seen[0].contiguous()
        pixels = torch.zeros((len(seen[0]), 3, *self.canvas), dtype=torch.uint8)
        for tiles, (top, view) in zip(seen, self.regions, strict=True):
            pixels[:, :, top : top + view.size[0], : view.size[1]] = tiles
        return pixels

    def _grid(self, size: tuple[int, int], images: int) -> tuple[int, int] | None:
        """(rows, columns) that an image of (width, height) is cut into; None: it is one tile."""
        if self.tiling is None or (isinstance(self.tiling, Anyres) and not self.tiling.cuts(images)):
            return None
        return self.tiling.grid(size, self._tile)

    def _seen(self, image: Image.Image, view: View, grid: tuple[int, int] | None) -> Tensor:
        """The tiles of an image as one encoder sees them (N, 3, h, w), cut by a grid of (rows, columns)."""
        route = WITH_PIL if self.exact else WITH_TORCH
        if grid is None:
            return route[view.resize](image, view.size, view.fill)[None]
        rows, columns = grid
        canvas = (rows * view.size[0], columns * view.size[1])
        whole = route["squash"](image, view.size, view.fill)[None]
        if isinstance(self.tiling, Anyres):
            return torch.cat([whole, _cut(route["fit"](image, canvas, (0, 0, 0)), rows, columns)])
        tiles = _cut(route["squash"](image, canvas, view.fill), rows, columns)
        has_thumbnail = self.tiling is not None and self.tiling.thumbnail and len(tiles) > 1
        return torch.cat([tiles, whole]) if has_thumbnail else tiles

    def fingerprint(self) -> str:
        """A short name of everything that decides the pixels and the token count."""
        text = json.dumps({"version": 1, **self.to_dict()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; ``from_dict`` reads them back. What is off has no key, as before it existed."""
        values = {name: _plain(value) for name, value in asdict(self).items()}
        values["tiling"] = self.tiling and tiling_to_dict(self.tiling)
        return {name: value for name, value in values.items() if name not in ("views", "draft", "tiling") or value}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ImageSpec:
        """The spec that ``to_dict`` wrote. Raises ConfigError on a missing or unknown key."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        missing = sorted({"size", "mean", "std", "resize", "tokens_per_tile"} - set(values))
        if unknown or missing:
            raise ConfigError(f"an image spec lacks {missing} and has unknown keys {unknown}; known: {sorted(known)}")
        plain = _with_tuples(values)
        views = tuple(View(**_with_tuples(view)) for view in plain.pop("views", ()))
        tiling = plain.pop("tiling", None)
        return cls(**plain, views=views, tiling=tiling and tiling_from_dict(tiling))

    @property
    def all_views(self) -> tuple[View, ...]:
        """How each encoder sees a tile, the first one's view first."""
        return (View(size=self.size, mean=self.mean, std=self.std, resize=self.resize), *self.views)

    @property
    def regions(self) -> tuple[tuple[int, View], ...]:
        """The first row of each view in the pixels of a tile, and the view; all begin at the left."""
        heights = [view.size[0] for view in self.all_views]
        return tuple((sum(heights[:i]), view) for i, view in enumerate(self.all_views))

    @property
    def canvas(self) -> Size:
        """(H, W) of the pixels of a tile: of all views, one below the other."""
        views = self.all_views
        return sum(view.size[0] for view in views), max(view.size[1] for view in views)

    @property
    def has_newline(self) -> bool:
        """True where image tokens are put together with a learned newline token."""
        return isinstance(self.tiling, Anyres) and self.tiling.unpad

    @property
    def _tile(self) -> tuple[int, int]:
        return self.size[1], self.size[0]

    @property
    def fill(self) -> tuple[int, int, int]:
        """The mean colour as LLaVA rounds it: down."""
        return self.all_views[0].fill


def normalize(pixels: Tensor, spec: ImageSpec) -> Tensor:
    """Float32 input of the encoder, ``(x / 255 - mean) / std``, on the device of ``pixels``: (N, 3, H, W) uint8.

    Each view has its own mean and std; right of a view that is narrower than the widest stand meaningless numbers.
    """
    regions = spec.regions
    if len(regions) == 1:
        return _normalize(pixels, regions[0][1])
    return torch.cat([_normalize(pixels[:, :, top : top + view.size[0]], view) for top, view in regions], dim=2)


def _normalize(pixels: Tensor, view: View) -> Tensor:
    mean = torch.tensor(view.mean, device=pixels.device).view(1, 3, 1, 1)
    std = torch.tensor(view.std, device=pixels.device).view(1, 3, 1, 1)
    return (pixels.float() / 255 - mean) / std


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _plain(value: Any) -> Any:  # noqa: ANN401  (a tree of settings)
    if isinstance(value, dict):
        return {name: _plain(below) for name, below in value.items()}
    return [_plain(below) for below in value] if isinstance(value, tuple) else value


def _cut(canvas: Tensor, rows: int, columns: int) -> Tensor:
    """(3, rows * H, columns * W) to tiles row by row, (rows * columns, 3, H, W)."""
    channels, height, width = canvas.shape
    tiles = canvas.reshape(channels, rows, height // rows, columns, width // columns)
    return tiles.permute(1, 3, 0, 2, 4).flatten(0, 1).contiguous()
