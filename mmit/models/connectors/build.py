"""From a run file's ``model.connector`` section to a connector with fresh weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmit.config import (
    AveragePoolConnector,
    CAbstractorConnector,
    CustomPart,
    LinearConnector,
    MlpConnector,
    PerceiverConnector,
    PixelShuffleConnector,
    QFormerConnector,
    Section,
)
from mmit.config import Connector as ConnectorSection
from mmit.errors import ConfigError
from mmit.models.connectors.average_pool import AveragePoolProjector
from mmit.models.connectors.interface import Connector
from mmit.models.connectors.mlp import MlpProjector
from mmit.models.connectors.perceiver import PerceiverResampler
from mmit.models.connectors.pixel_shuffle import PixelShuffleProjector
from mmit.models.connectors.qformer import QFormer, Reading, Shape
from mmit.models.plugins import make_custom
from mmit.tokenizer import load_tokenizer


@dataclass(frozen=True)
class _Sizes:
    width_in: int
    width_out: int
    patches: int

    @property
    def widths(self) -> dict[str, int]:
        return {"width_in": self.width_in, "width_out": self.width_out}


def _linear(_: LinearConnector, sizes: _Sizes) -> nn.Module:
    return MlpProjector(**sizes.widths, depth=1)


def _mlp(section: MlpConnector, sizes: _Sizes) -> nn.Module:
    return MlpProjector(**sizes.widths, depth=section.depth)


def _pixel_shuffle(section: PixelShuffleConnector, sizes: _Sizes) -> nn.Module:
    return PixelShuffleProjector(**sizes.widths, factor=section.factor, depth=section.depth)


def _average_pool(section: AveragePoolConnector, sizes: _Sizes) -> nn.Module:
    return AveragePoolProjector(**sizes.widths, count=section.tokens, depth=section.depth)


def _c_abstractor(section: CAbstractorConnector, sizes: _Sizes) -> nn.Module:
    from mmit.models.connectors.c_abstractor import CAbstractor

    inner = {"count": section.tokens, "hidden": section.hidden, "blocks": section.blocks, "depth": section.depth}
    return CAbstractor(**sizes.widths, patches=sizes.patches, **inner)


def _perceiver(section: PerceiverConnector, sizes: _Sizes) -> nn.Module:
    inner = {"depth": section.depth, "heads": section.heads, "head_width": section.head_width}
    return PerceiverResampler(**sizes.widths, count=section.tokens, **inner)


def _qformer(section: QFormerConnector, sizes: _Sizes) -> nn.Module:
    shape = Shape(
        hidden_size=section.hidden,
        num_hidden_layers=section.depth,
        num_attention_heads=section.heads,
        intermediate_size=section.intermediate,
        cross_attention_frequency=section.cross_every,
    )
    reading = None
    if asked := section.instruction:
        known = len(load_tokenizer(asked.tokenizer))
        vocabulary = asked.vocabulary or known
        if known > vocabulary:
            raise ConfigError(
                f"model.connector.instruction: the tokenizer {asked.tokenizer} has {known} tokens, the Q-Former's "
                f"table {vocabulary} rows; they do not belong together"
            )
        reading = Reading(
            tokenizer=asked.tokenizer, length=asked.length, vocabulary=vocabulary, positions=asked.positions
        )
    return QFormer(**sizes.widths, count=section.tokens, shape=shape, reading=reading, dropout=section.dropout)


def _custom(section: CustomPart, sizes: _Sizes) -> nn.Module:
    return make_custom(section.type, {**sizes.widths, **section.args}, key="model.connector")


_MAKERS: dict[type[Section], Callable[[Any, _Sizes], nn.Module]] = {
    LinearConnector: _linear,
    MlpConnector: _mlp,
    PixelShuffleConnector: _pixel_shuffle,
    AveragePoolConnector: _average_pool,
    CAbstractorConnector: _c_abstractor,
    PerceiverConnector: _perceiver,
    QFormerConnector: _qformer,
    CustomPart: _custom,
}


def build_connector(
    section: ConnectorSection, *, width_in: int, width_out: int, patches: int, seed: int, dtype: torch.dtype
) -> nn.Module:
    """A fresh connector; its weights depend on ``seed`` alone and the global random state is left as it was.

    patches: of a tile. A class of one's own gets ``width_in`` and ``width_out`` beside its ``args``. Raises
    ConfigError, also where the connector cannot take so many patches.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        connector = _MAKERS[type(section)](section, _Sizes(width_in, width_out, patches))
    name = type(connector).__name__
    if not isinstance(connector, Connector):
        raise ConfigError(f"model.connector: {name} lacks one of 'width_in', 'width_out' and 'tokens(patches)'")
    if (connector.width_in, connector.width_out) != (width_in, width_out):
        raise ConfigError(
            f"model.connector: it maps {connector.width_in} to {connector.width_out}, but the encoder gives {width_in} "
            f"and the language model takes {width_out}"
        )
    tokens = connector.tokens(patches)
    if not isinstance(tokens, int) or tokens < 1:
        raise ConfigError(f"model.connector: {name}.tokens({patches}) is {tokens!r}, no number of image tokens")
    return connector.to(dtype)
