"""Linear layers with GELU between them: LLaVA's projectors.

Layers are named ``linear_1``, ``linear_2``, ... as in transformers' LLaVA, whose projector is the MLP of depth 2.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class MlpProjector(nn.Module):
    """``depth`` linear layers with GELU between them; every patch becomes one image token.

    Depth 1 is LLaVA's (arXiv 2304.08485, sec. 4.1), depth 2 LLaVA-1.5's (arXiv 2310.03744, sec. 3.2).
    """

    keeps_grid = True

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
