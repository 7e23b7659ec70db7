"""What a connector is: the interface, and what one may say of itself beyond it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Connector(Protocol):
    """Patch features (N, P, ``width_in``) -> image tokens (N, ``tokens(P)``, ``width_out``).

    A connector may also say, as attributes of its class:

    keeps_grid: its tokens are a square grid, row by row, over the same picture as the patches' grid (default False).
    reads_instruction: it is called as ``connector(patches, ids, mask)`` with the question of each tile's turn, ids and
    mask (N, L) of its own tokenizer (default False).
    """

    width_in: int
    width_out: int

    def tokens(self, patches: int) -> int:
        """Image tokens for one tile of ``patches`` patches. Raises ConfigError for a number it cannot take."""
        ...

    def __call__(self, patches: Tensor) -> Tensor:
        """Image tokens (N, Q, width_out) of patch features (N, P, width_in)."""
        ...


def keeps_grid(connector: nn.Module | Connector) -> bool:
    """True where the image tokens of a tile are a square grid, row by row, over the tile's picture."""
    return bool(getattr(connector, "keeps_grid", False))


def reads_instruction(connector: nn.Module) -> bool:
    """True where the connector is to be given the question that the picture belongs to."""
    return bool(getattr(connector, "reads_instruction", False))
