"""The most bytes that PyTorch's own allocator had handed out at a time, on the CPU or on a GPU."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


class Allocations:
    """While in force, what is allocated is counted; afterwards ``peak`` is the most bytes that were held at a time.

    On the CPU the profiler tells each piece that the allocator hands out and takes back, those inside of kernels too;
    what was there before, mapped files, and libraries' own memory are not in it. On a GPU the allocator keeps the
    number itself; what was there before is in it.
    """

    def __init__(self, device: torch.device) -> None:
        self.peak = 0
        self._on_gpu = device.type != "cpu"
        self._profiler: Any = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> Allocations:
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            self._profiler.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated()
            return
        self._profiler.__exit__(kind, error, trace)
        events = self._profiler.profiler.kineto_results.events()
        pieces = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        held = 0
        for _, size in pieces:
            held += size
            self.peak = max(self.peak, held)
