"""Average pooling and an MLP: fewer tokens without a parameter more (DeCo, arXiv 2405.20985, sec. 4)."""

from __future__ import annotations

from torch import Tensor, nn

from mmit.errors import ConfigError
from mmit.models.connectors.grid import as_grid, average, side_of
from mmit.models.connectors.mlp import MlpProjector

_WHAT = "average_pool"


class AveragePoolProjector(nn.Module):
    """``count`` regional averages of the patches, then ``depth`` linear layers.

    count: a perfect square. The regions are those of adaptive pooling, which need not divide the grid.
    """

    keeps_grid = True
    needs_square = True

    def __init__(self, *, width_in: int, width_out: int, count: int, depth: int) -> None:
        super().__init__()
        self.width_in = width_in
        self.width_out = width_out
        self.count = count
        self.mlp = MlpProjector(width_in=width_in, width_out=width_out, depth=depth)

    def tokens(self, patches: int) -> int:
        """Always ``count``. Raises ConfigError where there are fewer patches, or no square grid of them."""
        return check_count(self.count, patches, what=_WHAT)

    def forward(self, patches: Tensor) -> Tensor:
        """Image tokens (N, count, width_out) of patch features (N, P, width_in)."""
        regions = average(as_grid(patches, what=_WHAT), side_of(self.count, what=_WHAT))
        return self.mlp(regions.flatten(1, 2))


def check_count(count: int, patches: int, *, what: str) -> int:
    """``count``, or ConfigError where a square grid of ``patches`` has no so many regions."""
    side_of(patches, what=what)
    if count > patches:
        raise ConfigError(
            f"model.connector.tokens: {what} cannot make {count} tokens of {patches} patches; take at most {patches}"
        )
    return count
