"""The C library's allocator, while a model passes through a rank on its way into pieces.

glibc keeps the holes that freed tensors leave, and raises by itself the size from which a block is given back to the
system: a rank that hands out a model tensor by tensor would hold 1.4 to 1.8 times the model instead of 0.8.
"""

from __future__ import annotations

import ctypes
from collections.abc import Generator
from contextlib import contextmanager

_M_MMAP_THRESHOLD = -3
_LARGE = 256 * 1024
_USUAL = 32 * 1024 * 1024
"""Where glibc's own adjustment ends."""


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
