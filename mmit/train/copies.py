"""Copies of tensors in the memory of the host, whose memory is kept from one checkpoint to the next.

While a copy is taken the step waits. The system hands out fresh memory page by page, filled with zeros first, which
takes several times as long as to copy into memory that is there already.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Copies:
    """Memory for one copy of each of some tensors, known by name."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def of(self, name: str, tensor: Tensor) -> Tensor:
        """The values of ``tensor`` as they are now, in place of what was copied under this name before."""
        kept = self._kept.get(name)
        if kept is None or (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
            kept = self._kept[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return kept.copy_(tensor.detach())
