"""Connectors: from patch features to vectors that stand among the language model's token embeddings.

``tokens(P)`` is known before anything runs, since the data side counts image tokens from the image header alone.
Layers are named ``linear_1``, ``linear_2``, ... as in transformers' LLaVA, whose projector is the MLP of depth 2.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmit.config import CustomPart, LinearConnector, MlpConnector
from mmit.errors import ConfigError
from mmit.models.plugins import make_custom


@runtime_checkable
class Connector(Protocol):
    """Patch features (N, P, ``width_in``) -> image tokens (N, ``tokens(P)``, ``width_out``)."""

    width_in: int
    width_out: int

    def tokens(self, patches: int) -> int:
        """Image tokens for one tile of ``patches`` patches."""
        ...

    def __call__(self, patches: Tensor) -> Tensor:
        """Image tokens (N, Q, width_out) of patch features (N, P, width_in)."""
        ...


class MlpProjector(nn.Module):
    """``depth`` linear layers with GELU between them; every patch becomes one image token.

    Depth 1 is LLaVA's (arXiv 2304.08485, sec. 4.1), depth 2 LLaVA-1.5's (arXiv 2310.03744, sec. 3.2).
    """

    def __init__(self, *, width_in: int, width_out: int, depth: int) -> None:
        super().__init__()
        self.width_in = width_in
        self.width_out = width_out
        self.depth = depth
        for i in range(depth):
            self.add_module(f"linear_{i + 1}", nn.Linear(width_out if i else width_in, width_out))

    def tokens(self, patches: int) -> int:
        """As many image tokens as patches."""
        return patches

    def forward(self, patches: Tensor) -> Tensor:
        """Image tokens (N, P, width_out) of patch features (N, P, width_in)."""
        hidden = patches
        for i, layer in enumerate(self.children()):
            hidden = layer(functional.gelu(hidden) if i else hidden)
        return hidden


def build_connector(
    section: LinearConnector | MlpConnector | CustomPart,
    *,
    width_in: int,
    width_out: int,
    seed: int,
    dtype: torch.dtype,
) -> nn.Module:
    """A fresh connector; its weights depend on ``seed`` alone and the global random state is left as it was.

    A class of one's own gets ``width_in`` and ``width_out`` beside its ``args``. Raises ConfigError.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        connector: nn.Module
        if isinstance(section, CustomPart):
            arguments = {"width_in": width_in, "width_out": width_out, **section.args}
            connector = make_custom(section.type, arguments, key="model.connector")
        else:
            depth = section.depth if isinstance(section, MlpConnector) else 1
            connector = MlpProjector(width_in=width_in, width_out=width_out, depth=depth)
    if not isinstance(connector, Connector):
        raise ConfigError(
            f"model.connector: {type(connector).__name__} lacks one of 'width_in', 'width_out' and 'tokens(patches)'"
        )
    if (connector.width_in, connector.width_out) != (width_in, width_out):
        raise ConfigError(
            f"model.connector: it maps {connector.width_in} to {connector.width_out}, but the encoder gives {width_in} "
            f"and the language model takes {width_out}"
        )
    return connector.to(dtype)
