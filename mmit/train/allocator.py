"""The C library's allocator: gives memory back while a model is taken to pieces, keeps it while CPUs train.

glibc keeps the holes that freed tensors leave, and raises by itself the size from which a block is given back to the
system: a rank that hands out a model tensor by tensor would hold 1.4 to 1.8 times the model instead of 0.8. A training
step on the CPU has the opposite need: it asks for the same blocks again and again, and what was given back is faulted
in page by page (docs/performance.md).
"""

from __future__ import annotations

import ctypes
from collections.abc import Generator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE = 256 * 1024
_USUAL = 32 * 1024 * 1024
"""Where glibc's own adjustment of the second ends; it keeps the first at twice as much."""
_ALL = 2**31 - 1
"""The most that mallopt's int can say."""


def keep_freed_memory() -> None:
    """Freed blocks stay with the process for its next step; nothing changes where the library is not glibc."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        if not library.mallopt(_M_MMAP_THRESHOLD, _ALL):  # an older glibc may refuse so much
            library.mallopt(_M_MMAP_THRESHOLD, _USUAL)
        library.mallopt(_M_TRIM_THRESHOLD, _ALL)


@contextmanager
def memory_given_back() -> Generator[None]:
    """Freed blocks of 256 kB and more go back to the system at once; nothing changes where the library is not glibc."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        yield
        return
    library.mallopt(_M_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        library.malloc_trim(0)
        library.mallopt(_M_MMAP_THRESHOLD, _USUAL)
        library.mallopt(_M_TRIM_THRESHOLD, 2 * _USUAL)
