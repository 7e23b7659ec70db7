"""Honeybee's C-Abstractor: convolutions, average pooling, convolutions (arXiv 2312.06742, sec. 3.3)."""

from __future__ import annotations

from functools import partial

import torch
from timm.layers import LayerNorm2d
from timm.models.regnet import RegStage
from torch import Tensor, nn

from mmit.models.connectors.average_pool import check_count
from mmit.models.connectors.grid import as_grid, average, side_of

_WHAT = "c_abstractor"


class CAbstractor(nn.Module):
    """Learned positions, ``blocks`` residual blocks, ``count`` regional averages, ``blocks`` more, an MLP with SiLU.

    The blocks are RegNet's bottlenecks with squeeze-and-excitation, ``hidden`` channels wide, and tensors are named as
    in Honeybee's code: ``pos_emb``, ``net.0.b1`` ..., ``readout``. patches: of a tile, for the positions.
    Starts as published: positions from a normal of 0.02 cut at two, the rest as torch starts its layers.
    """

    keeps_grid = True
    needs_square = True

    def __init__(
        self, *, width_in: int, width_out: int, patches: int, count: int, hidden: int, blocks: int, depth: int
    ) -> None:
        super().__init__()
        self.width_in = width_in
        self.width_out = width_out
        self.count = count
        stage = partial(RegStage, blocks, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=LayerNorm2d)
        self.pos_emb = nn.Parameter(torch.zeros(1, patches, width_in))
        nn.init.trunc_normal_(self.pos_emb, std=0.02)
        self.net = nn.ModuleDict({"0": stage(width_in, hidden), "2": stage(hidden, hidden)})
        layers: list[nn.Module] = [nn.Linear(hidden, width_out)]
        for _ in range(depth - 1):
            layers += [nn.SiLU(), nn.Linear(width_out, width_out)]
        self.readout = nn.Sequential(*layers)

    def tokens(self, patches: int) -> int:
        """Always ``count``. Raises ConfigError where there are fewer patches, or no square grid of them."""
        return check_count(self.count, patches, what=_WHAT)

    def forward(self, patches: Tensor) -> Tensor:
        """Image tokens (N, count, width_out) of patch features (N, P, width_in)."""
        grid = as_grid(patches + self.pos_emb, what=_WHAT)
        local = self.net["0"](grid.permute(0, 3, 1, 2))  # (N, hidden, S, S)
        regions = average(local.permute(0, 2, 3, 1), side_of(self.count, what=_WHAT))
        mixed = self.net["2"](regions.permute(0, 3, 1, 2))
        return self.readout(mixed.flatten(2).transpose(1, 2))
