"""``model.connector`` of a run file: how patch features become image tokens. docs/connectors.md compares them."""

from __future__ import annotations

from math import isqrt
from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from mmit.config.parts import CustomPart, kind_of
from mmit.config.sections import Section


def _is_square(count: int) -> int:
    if isqrt(count) ** 2 != count:
        raise ValueError(f"{count} is no square number, such as {isqrt(count) ** 2 or 1} or {(isqrt(count) + 1) ** 2}")
    return count


Depth = Annotated[int, Field(ge=1, le=8)]
Size = Annotated[int, Field(ge=1)]
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


Connector = Annotated[
    Annotated[LinearConnector, Tag("linear")]
    | Annotated[MlpConnector, Tag("mlp")]
    | Annotated[PixelShuffleConnector, Tag("pixel_shuffle")]
    | Annotated[AveragePoolConnector, Tag("average_pool")]
    | Annotated[CAbstractorConnector, Tag("c_abstractor")]
    | Annotated[PerceiverConnector, Tag("perceiver_resampler")]
    | Annotated[CustomPart, Tag("custom")],
    Discriminator(
        kind_of,
        custom_error_type="unknown_type",
        custom_error_message=(
            "'type' must be one of linear, mlp, pixel_shuffle, average_pool, c_abstractor, perceiver_resampler, or "
            "package.module:Class"
        ),
    ),
]
