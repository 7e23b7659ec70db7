"""Pixel shuffle and an MLP: InternVL's projector, which trades resolution for width."""

from __future__ import annotations

from torch import Tensor, nn

from mmit.errors import ConfigError
from mmit.models.connectors.grid import as_grid, side_of
from mmit.models.connectors.mlp import MlpProjector

_WHAT = "pixel_shuffle"


def pixel_shuffle(patches: Tensor, factor: int) -> Tensor:
    """Merge each ``factor`` x ``factor`` square of patches into one, side by side along the width.

    patches: (N, P, D), P a perfect square with side divisible by ``factor``. Returns (N, P / factor**2,
    D * factor**2); squares and the patches within a square are row-major. Raises ConfigError if P does not fit. Used
    by InternVL (arXiv 2404.16821, sec. 3.1; the order is that of its second version, "v2").
    """
    grid = as_grid(patches, what=_WHAT)
    _check_divides(grid.shape[1], factor)
    squares = grid.unflatten(1, (-1, factor)).unflatten(3, (-1, factor))  # (N, rows, in row, columns, in column, D)
    return squares.transpose(2, 3).flatten(3).flatten(1, 2)


class PixelShuffleProjector(nn.Module):
    """Pixel shuffle, layer norm, then ``depth`` linear layers; InternVL 1.5 takes factor 2 and depth 2."""

    keeps_grid = True
    needs_square = True

    def __init__(self, *, width_in: int, width_out: int, factor: int, depth: int) -> None:
        super().__init__()
        self.width_in = width_in
        self.width_out = width_out
        self.factor = factor
        self.norm = nn.LayerNorm(width_in * factor**2)
        self.mlp = MlpProjector(width_in=width_in * factor**2, width_out=width_out, depth=depth)

    def tokens(self, patches: int) -> int:
        """``factor**2`` patches become one token. Raises ConfigError for a grid that cannot be cut into squares."""
        _check_divides(side_of(patches, what=_WHAT), self.factor)
        return patches // self.factor**2

    def forward(self, patches: Tensor) -> Tensor:
        """Image tokens (N, P / factor**2, width_out) of patch features (N, P, width_in)."""
        return self.mlp(self.norm(pixel_shuffle(patches, self.factor)))


def _check_divides(side: int, factor: int) -> None:
    if side % factor:
        raise ConfigError(
            f"model.connector: pixel_shuffle merges squares of {factor} x {factor} patches, which do not cut a grid of "
            f"{side} x {side}; choose a factor that divides {side}"
        )
