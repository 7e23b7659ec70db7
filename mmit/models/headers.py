"""Headers of weight files: names, shapes and dtypes of tensors, without their values.

A safetensors file begins with a JSON header, which is read as it is; a ``*.bin`` file is mapped by torch's restricted
reader, and its values are never touched. Both take the same time for a large file as for a small one.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmit.errors import CheckpointError

_MOST = 100 * 2**20
"""Largest header that safetensors itself reads."""

_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
_SHORT = {
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"},
    **{"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"},
}


@dataclass(frozen=True)
class TensorHeader:
    """One stored tensor. dtype: safetensors' name for it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str

    @property
    def parameters(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size of the values in memory."""
        return self.parameters * _BYTES.get(self.dtype, 1)


def read_headers(file: Path) -> list[TensorHeader]:
    """The tensors of a safetensors or ``*.bin`` file. Raises CheckpointError for one that is damaged or holds code."""
    if file.suffix == ".safetensors":
        return _safetensors(file)
    from mmit.models.pickles import read_pickled

    return [
        TensorHeader(name, tuple(tensor.shape), _SHORT.get(str(tensor.dtype).removeprefix("torch."), "?"), file.name)
        for name, tensor in read_pickled(file).items()
    ]


def _safetensors(file: Path) -> list[TensorHeader]:
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _MOST:
                raise ValueError(f"a header of {length} bytes")
            content = json.loads(stream.read(length))
        content.pop("__metadata__", None)
        found = [_header(name, one, file) for name, one in content.items()]
        end = 8 + length + max((one["data_offsets"][1] for one in content.values()), default=0)
        size = file.stat().st_size
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise CheckpointError(f"{file} is damaged or incomplete ({error}); copy or make it again") from error
    if size != end:
        raise CheckpointError(f"{file} has {size} bytes where its header says {end}; copy or make it again")
    return found


def _header(name: str, one: dict[str, Any], file: Path) -> TensorHeader:
    shape, (begin, end) = one["shape"], one["data_offsets"]
    if not all(type(size) is int and size >= 0 for size in (*shape, begin, end)):
        raise ValueError(f"{name} has the shape {shape} at {begin} to {end}")
    header = TensorHeader(name, tuple(shape), str(one["dtype"]), file.name)
    if header.dtype in _BYTES and header.bytes != end - begin:
        raise ValueError(f"{name} of {header.bytes} bytes lies in {end - begin}")
    return header
