"""The most bytes that PyTorch's own allocator had handed out at a time, on the CPU or on a GPU."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

COLLECTIVES = "c10d::"
"""How PyTorch's operations begin that send something."""


class Allocations:
    """While in force, what is allocated is counted; afterwards ``peak`` is the most bytes that were held at a time.

    On the CPU the profiler tells each piece that the allocator hands out and takes back, those inside of kernels too;
    what was there before, mapped files, and libraries' own memory are not in it, nor are the copies that gloo makes of
    what it sends and holds until its threads have other work. On a GPU the allocator keeps the number itself; what was
    there before is in it.
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
        events = list(self._profiler.profiler.kineto_results.experimental_event_tree())
        pieces = list[tuple[int, int, int, bool]]()
        inside = dict.fromkeys(map(id, events), False)
        for event in events:  # which grows: children behind their parents
            sends = inside[id(event)] or event.name.startswith(COLLECTIVES)
            events += event.children
            inside.update(dict.fromkeys(map(id, event.children), sends))
            if event.tag.name == "Allocation":
                piece = event.extra_fields
                pieces.append((event.start_time_ns, piece.alloc_size, piece.ptr, sends))
        self.peak = _peak(sorted(pieces))


def _peak(pieces: list[tuple[int, int, int, bool]]) -> int:
    """The most bytes at a time. pieces: when, bytes (below 0: taken back), address, and whether it is left out.

    What gloo's threads take back is not told; an address that is handed out again has been taken back before.
    """
    peak = held = 0
    sizes = dict[int, int]()
    for _, size, place, is_left_out in pieces:
        held -= sizes.pop(place, 0)
        if size > 0 and not is_left_out:
            sizes[place] = size
            held += size
            peak = max(peak, held)
    return peak
