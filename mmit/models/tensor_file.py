"""A safetensors file that is filled tensor by tensor, in any order: no more than one of them need be in memory.

The layout is that of the safetensors library, byte for byte. Unlike its own function, which holds Python's lock until
all is on disk, this one lets other threads run meanwhile, and a write that fails is an OSError with its reason.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

# In the order of the library, which puts the later ones first.
_CODES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_ORDER = {dtype: number for number, dtype in enumerate(_CODES)}
_CHUNK_BYTES = 1 << 24
"""Written at once: other threads get their turn between two chunks, and what waits for the disk stays small."""


def bytes_of(tensor: Tensor) -> int:
    """Size of the values of a tensor, also of one without storage."""
    return tensor.numel() * tensor.element_size()


def outlined(tensor: Tensor) -> Tensor:
    """Shape and dtype of a tensor, without storage."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


class TensorFile:
    """One file being written; ``close`` when every tensor is in it."""

    def __init__(self, path: Path, outline: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> None:
        """Write the header. outline: tensors whose shapes and dtypes are taken, values need not be there."""
        order = sorted(outline, key=lambda name: (-_ORDER[outline[name].dtype], name))
        content: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        self._starts: dict[str, int] = {}
        self._left = {name: bytes_of(tensor) for name, tensor in outline.items()}
        end = 0
        for name in order:
            start, end = end, end + self._left[name]
            self._starts[name] = start
            dtype, shape = _CODES[outline[name].dtype], list(outline[name].shape)
            content[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        header = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
        header += b" " * (-len(header) % 8)
        self._begin = 8 + len(header)
        self._file = path.open("wb", buffering=0)
        self._write(len(header).to_bytes(8, "little") + header)

    def put(self, name: str, values: Tensor, *, start: int = 0) -> None:
        """Write a tensor, or a stretch of it from its element ``start``, of the dtype that the outline says."""
        self._file.seek(self._begin + self._starts[name] + start * values.element_size())
        flat = values.detach().cpu().contiguous().view(-1)
        self._left[name] -= bytes_of(flat)
        if flat.numel():
            self._write(flat.view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Wait until the disk has all of it."""
        wanting = [name for name, left in self._left.items() if left]
        assert not wanting, f"not all of {wanting[:3]} was written"
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Leave a file that could not be written whole."""
        self._file.close()

    def _write(self, content: bytes | memoryview) -> None:
        rest = memoryview(content)
        while rest:
            rest = rest[self._file.write(rest[:_CHUNK_BYTES]) :]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> None:
    """Write all tensors into one file. Raises OSError."""
    file = TensorFile(path, tensors, metadata=metadata)
    try:
        for name, tensor in tensors.items():
            file.put(name, tensor)
        file.close()
    finally:
        file.abandon()
