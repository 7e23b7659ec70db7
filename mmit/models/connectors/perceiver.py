"""Flamingo's perceiver resampler: learned latents that attend to the patches (arXiv 2204.14198, sec. 3.1.1)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional


class PerceiverResampler(nn.Module):
    """``count`` latents, ``depth`` times attention to patches and latents and a feed-forward layer, then one linear.

    Tensors are named as in OpenFlamingo's code (``latents``, ``layers.0.0.to_kv``, ``norm``); the last layer
    (``projection``) brings the encoder's width, in which the resampler works, to the language model's. Positions are
    the encoder's; no frames are told apart. Starts as OpenFlamingo: latents from a standard normal, the rest as torch
    starts its layers.
    """

    def __init__(self, *, width_in: int, width_out: int, count: int, depth: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.width_in = width_in
        self.width_out = width_out
        self.count = count
        self.latents = nn.Parameter(torch.randn(count, width_in))
        self.layers = nn.ModuleList(
            nn.ModuleList([_Attention(width_in, heads=heads, head_width=head_width), _feed_forward(width_in)])
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width_in)
        self.projection = nn.Linear(width_in, width_out)

    def tokens(self, patches: int) -> int:
        """Always the number of latents."""
        del patches
        return self.count

    def forward(self, patches: Tensor) -> Tensor:
        """Image tokens (N, count, width_out) of patch features (N, P, width_in)."""
        hidden = self.latents.expand(patches.shape[0], -1, -1)  # (N, Q, width_in)
        for layer in self.layers:
            attention, feed_forward = cast("nn.ModuleList", layer)
            hidden = hidden + attention(patches, hidden)
            hidden = hidden + feed_forward(hidden)
        return self.projection(self.norm(hidden))


class _Attention(nn.Module):
    """Latents ask; patches and latents answer."""

    def __init__(self, width: int, *, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_media = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * head_width, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * head_width, bias=False)
        self.to_out = nn.Linear(heads * head_width, width, bias=False)

    def forward(self, patches: Tensor, latents: Tensor) -> Tensor:
        latents = self.norm_latents(latents)
        read = torch.cat([self.norm_media(patches), latents], dim=1)  # (N, P + Q, D)
        key, value = self.to_kv(read).chunk(2, dim=-1)
        query, key, value = (self._split(tensor) for tensor in (self.to_q(latents), key, value))
        found = functional.scaled_dot_product_attention(query, key, value)  # (N, heads, Q, head width)
        return self.to_out(found.transpose(1, 2).flatten(2))

    def _split(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, 4 * width, bias=False),
        nn.GELU(),
        nn.Linear(4 * width, width, bias=False),
    )
