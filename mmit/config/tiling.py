"""The ``model.tiling`` section of a run file: how a picture is cut into several tiles."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from mmit.config.sections import Section

Pinpoints = Annotated[list[tuple[PositiveInt, PositiveInt]], Field(min_length=1)]


class AnyresTiling(Section):
    """The whole picture as one tile, then a grid of tiles that fits its shape (LLaVA-NeXT, LLaVA-OneVision)."""

    type: Literal["anyres"]
    pinpoints: (
        Literal["llava_next", "onevision"] | Annotated[list[tuple[PositiveInt, PositiveInt]], Field(min_length=1)]
    ) = "llava_next"
    """Grids to choose from, each (width, height) in pixels and whole tiles; of equally good ones the first is taken.
    ``llava_next``: 1x2, 2x1, 2x2, 3x1 and 1x3 tiles (columns x rows). ``onevision``: 1x1 to 6x6."""
    unpad: bool = True
    """True: the tokens of the grid lie as one field, without those that only see padding, and a learned token ends each
    row. False: tile after tile; for connectors whose tokens are no grid."""
    shrink_to: Annotated[int, Field(ge=0)] = 0
    """Resize the field of tokens to about those of so many tiles where it has more (OneVision: 9); 0 never does."""
    several: Literal["tiled", "whole"] = "tiled"
    """Pictures of a sample with several: each is ``tiled`` (LLaVA-NeXT), or one tile, resized as the encoder's section
    says (``whole``, LLaVA-OneVision)."""

    @model_validator(mode="after")
    def _a_field_to_shrink(self) -> AnyresTiling:
        if self.shrink_to and not self.unpad:
            raise ValueError("'shrink_to' resizes the field of tokens that unpad: true makes")
        return self


class DynamicTiling(Section):
    """A grid of tiles whose shape is nearest to the picture's, which is squashed into it (InternVL 1.5)."""

    type: Literal["dynamic"]
    min_tiles: PositiveInt = 1
    """Fewest tiles of the grid."""
    max_tiles: PositiveInt = 12
    """Most tiles of the grid."""
    thumbnail: bool = True
    """The whole picture as a last tile, where the grid has more than one."""

    @model_validator(mode="after")
    def _a_range(self) -> DynamicTiling:
        if self.min_tiles > self.max_tiles:
            raise ValueError(f"'min_tiles' {self.min_tiles} is above 'max_tiles' {self.max_tiles}")
        return self


Tiling = Annotated[AnyresTiling | DynamicTiling, Field(discriminator="type")]
