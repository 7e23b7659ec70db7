"""The bytes of tensors that are alive: those that operations make while they are counted, from birth to death."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_INSIDE = (torch.ops.aten.logsumexp.default,)
"""Kernels that allocate as much as their first argument inside: torch subtracts the maximum into a copy."""


class LiveTensors(TorchDispatchMode):
    """While in force, counts the bytes of each storage until nothing holds it any more, on whatever device.

    total, peak: bytes now and at the worst moment. at_peak: of the worst moment, by the ``part`` that was set when
    they were made. Operations between a tensor on the meta device and others are computed on the meta device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = ""
        self.total = self.peak = 0
        self.at_peak: Counter[str] = Counter()
        self._sizes: Counter[str] = Counter()
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Do not count these, which are there before, when they are seen."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[id(storage)] = weakref.ref(storage)

    def count(self, tensors: Iterable[Tensor]) -> None:
        """Count these; those that are counted already are not counted twice."""
        for tensor in tensors:
            self._count(tensor.untyped_storage())

    def reached(self, alive: int) -> None:
        """Called with the bytes that are alive whenever they have grown."""
        if alive > self.peak:
            self.peak = alive
            self.at_peak = self._sizes.copy()
            self.at_peak[self.part] += alive - self.total

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the operation gives
        given = (args, kwargs or {})
        if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves(given)):
            given = tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, given)
        made = func(*given[0], **given[1])
        self.count(leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor))
        if func in _INSIDE:
            self.reached(self.total + given[0][0].nbytes)
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size, part = id(storage), storage.nbytes(), self.part
        if key in self._known:
            return

        def forget(_: object) -> None:
            del self._known[key]
            self._sizes[part] -= size
            self.total -= size

        self._known[key] = weakref.ref(storage, forget)
        self._sizes[part] += size
        self.total += size
        self.reached(self.total)
