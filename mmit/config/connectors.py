"""``model.connector`` of a run file: how patch features become image tokens. docs/connectors.md compares them."""

from __future__ import annotations

from math import isqrt
from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from mmit.config.parts import CustomPart, kind_of
from mmit.config.sections import BelowOne, Section


def _is_square(count: int) -> int:
    if isqrt(count) ** 2 != count:
        raise ValueError(f"{count} is no square number, such as {isqrt(count) ** 2 or 1} or {(isqrt(count) + 1) ** 2}")
    return count


Depth = Annotated[int, Field(ge=1, le=8)]
Size = Annotated[int, Field(ge=1, le=2**16)]
SquareNumber = Annotated[int, Field(ge=1), AfterValidator(_is_square)]


class LinearConnector(Section):
    """One linear layer (LLaVA 1.0, arXiv 2304.08485)."""

    type: Literal["linear"]


class MlpConnector(Section):
    """Linear layers with GELU between them (LLaVA 1.5, arXiv 2310.03744, uses two)."""

    type: Literal["mlp"] = "mlp"
    depth: Annotated[int, Field(ge=2, le=8)] = 2
    """Number of linear layers."""


class PixelShuffleConnector(Section):
    """Squares of patches become one token, then an MLP (InternVL 1.5, arXiv 2404.16821)."""

    type: Literal["pixel_shuffle"]
    factor: Annotated[int, Field(ge=2, le=8)] = 2
    """Side of the squares: ``factor * factor`` patches become one image token."""
    depth: Depth = 2
    """Number of linear layers."""


class AveragePoolConnector(Section):
    """Averages over regions of the patches, then an MLP (DeCo, arXiv 2405.20985)."""

    type: Literal["average_pool"]
    tokens: SquareNumber = 144
    """Image tokens of a tile, a square number."""
    depth: Depth = 2
    """Number of linear layers."""


class CAbstractorConnector(Section):
    """Convolutions, averages over regions, convolutions (Honeybee, arXiv 2312.06742)."""

    type: Literal["c_abstractor"]
    tokens: SquareNumber = 144
    """Image tokens of a tile, a square number."""
    hidden: Size = 1024
    """Channels of the convolutions."""
    blocks: Depth = 3
    """Residual blocks before the averages, and as many after them."""
    depth: Depth = 2
    """Number of linear layers at the end."""


class PerceiverConnector(Section):
    """Learned latents that attend to the patches (Flamingo, arXiv 2204.14198)."""

    type: Literal["perceiver_resampler"]
    tokens: Size = 64
    """Image tokens of a tile: the latents."""
    depth: Annotated[int, Field(ge=1, le=48)] = 6
    """Number of layers."""
    heads: Size = 8
    """Heads of attention."""
    head_width: Size = 64
    """Width of a head."""


class Instruction(Section):
    """How a Q-Former reads the question that a picture belongs to (InstructBLIP, arXiv 2305.06500)."""

    tokenizer: str
    """Directory or hub name of its own tokenizer, such as ``bert-base-uncased``."""
    length: Size = 128
    """Most tokens of a question; a longer one is cut."""
    vocabulary: Annotated[int, Field(ge=0)] = 0
    """Rows of its table of words; 0: as many as the tokenizer has tokens."""
    positions: Size = 512
    """Rows of its table of positions, at least ``length``."""

    @model_validator(mode="after")
    def _fits(self) -> Instruction:
        if self.length > self.positions:
            raise ValueError(f"length {self.length} is more than positions {self.positions}")
        return self


class QFormerConnector(Section):
    """Queries that look at the patches in every second layer of a BERT (BLIP-2, arXiv 2301.12597)."""

    type: Literal["qformer"]
    tokens: Size = 32
    """Image tokens of a tile: the queries."""
    hidden: Size = 768
    """Width of the layers."""
    depth: Annotated[int, Field(ge=1, le=48)] = 12
    """Number of layers."""
    heads: Size = 12
    """Heads of attention; a divisor of ``hidden``."""
    intermediate: Size = 3072
    """Width inside the feed-forward layers."""
    cross_every: Size = 2
    """The queries look at the patches in every layer so far apart, from the first."""
    dropout: BelowOne = 0.0
    """Dropout while the connector trains (BERT's is 0.1); 0 keeps training deterministic."""
    pretrained: str = ""
    """Weights to start from: the directory of a BERT, BLIP-2 or InstructBLIP model of transformers, or a ``.pth`` file
    of LAVIS; empty: random ones."""
    instruction: Instruction | None = None
    """Reads the question too (InstructBLIP); left out: looks at the picture alone (BLIP-2)."""

    @model_validator(mode="after")
    def _divides(self) -> QFormerConnector:
        if self.hidden % self.heads:
            raise ValueError(f"heads {self.heads} does not divide hidden {self.hidden}")
        return self


Connector = Annotated[
    Annotated[LinearConnector, Tag("linear")]
    | Annotated[MlpConnector, Tag("mlp")]
    | Annotated[PixelShuffleConnector, Tag("pixel_shuffle")]
    | Annotated[AveragePoolConnector, Tag("average_pool")]
    | Annotated[CAbstractorConnector, Tag("c_abstractor")]
    | Annotated[PerceiverConnector, Tag("perceiver_resampler")]
    | Annotated[QFormerConnector, Tag("qformer")]
    | Annotated[CustomPart, Tag("custom")],
    Discriminator(
        kind_of,
        custom_error_type="unknown_type",
        custom_error_message=(
            "'type' must be one of linear, mlp, pixel_shuffle, average_pool, c_abstractor, perceiver_resampler, "
            "qformer, or package.module:Class"
        ),
    ),
]
