"""What a connector is: the interface, and what one may say of itself beyond it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from mmit.batch import Batch
from mmit.errors import ConfigError, DataError
from mmit.instructions import InstructionReader
from mmit.tokenizer import load_tokenizer


@runtime_checkable
class Connector(Protocol):
    """Patch features (N, P, ``width_in``) -> image tokens (N, ``tokens(P)``, ``width_out``).

    A connector may also say, as attributes of its class:

    keeps_grid: its tokens are a square grid, row by row, over the same picture as the patches' grid (default False).
    reads_instruction: it is called as ``connector(patches, ids, mask)`` with the question of each tile's turn, ids and
    mask (N, L) (default False). It then has ``instruction_tokenizer``, directory or hub name, and
    ``instruction_length``, the most tokens of a question.
    needs_square: it takes the patches for a square grid, row by row, which a number of patches does not show
    (default False).
    idle: names of parameters that it only keeps for files and that no output depends on (default none).
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


def check_picture(connector: object, size: tuple[int, int]) -> None:
    """Raise ConfigError where pictures of ``size`` (H, W) give no square grid and the connector takes it for one."""
    if getattr(connector, "needs_square", False) and size[0] != size[1]:
        raise ConfigError(
            f"model.connector: {type(connector).__name__} needs a square grid of patches, the encoder takes pictures "
            f"of {size[1]} x {size[0]} pixels"
        )


def reads_instruction(connector: nn.Module) -> bool:
    """True where the connector is to be given the question that the picture belongs to."""
    return bool(getattr(connector, "reads_instruction", False))


def idle_parameters(connector: nn.Module) -> frozenset[str]:
    """Names of the connector's parameters that never train, since nothing depends on them."""
    return frozenset(getattr(connector, "idle", ()))


@runtime_checkable
class InstructionAware(Protocol):
    """What a connector that reads instructions has beside the interface."""

    instruction_tokenizer: str
    instruction_length: int


def instruction_reader(connector: object) -> InstructionReader | None:
    """What turns questions into the connector's tokens, or None for one that reads none. Raises ConfigError."""
    if not isinstance(connector, nn.Module) or not reads_instruction(connector):
        return None
    if not isinstance(connector, InstructionAware):
        raise ConfigError(
            f"model.connector: {type(connector).__name__} reads instructions and lacks 'instruction_tokenizer' or "
            "'instruction_length'"
        )
    return InstructionReader(load_tokenizer(connector.instruction_tokenizer), connector.instruction_length)


def questions_for(connector: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    """Ids and mask (N, L) of what the tiles' turns ask, to be given to a connector that reads it; nothing for others.

    One padding token where the batch has no tile. Raises DataError for a batch that came without the questions.
    """
    if not reads_instruction(connector):
        return ()
    if not batch.tiles:
        blank = batch.input_ids.new_zeros((1, 1))
        return blank, blank + 1
    asked = batch.instructions
    if asked is None or asked.ids.shape[0] != batch.tiles:
        rows = 0 if asked is None else asked.ids.shape[0]
        raise DataError(
            f"{batch.tiles} tiles but {rows} instructions, which the connector reads; encode the samples with the "
            "model's InstructionReader (LoadedModel.instructions)"
        )
    return asked.ids, asked.mask
