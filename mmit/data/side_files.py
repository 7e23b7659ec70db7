"""What is computed once about a data set and kept beside its shards, or in the cache where that cannot be written.

A table of rows is ``NAME.npy``, memory-mapped when it is read, so that all processes of a host share it; what belongs
to it is ``NAME.json``, written first. Of several processes one computes and the others wait.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmit.conversation import Conversation
from mmit.data.atomic import cannot_write, write_whole
from mmit.errors import DataError


class TextSet(Protocol):
    """What computing something about the texts of a data set needs of it."""

    name: str
    fingerprint: str
    directory: Path
    cache: Path
    quarantined: np.ndarray
    left_out: str

    def __len__(self) -> int: ...

    def read_text(self, number: int) -> Conversation:
        """The sample, without the bytes of its images where their sizes are known."""
        ...

    def place(self, number: int) -> tuple[str, str]:
        """Shard and key of the sample."""
        ...


Table = tuple[np.ndarray, Any]
"""Rows, and what belongs to them as JSON."""


def kept(data: TextSet, fingerprint: str, compute: Callable[[], Table], *, dtype: np.dtype) -> Table:
    """The table stored under a fingerprint, or the computed one, then stored. Raises DataError."""
    name = hashlib.sha256(fingerprint.encode()).hexdigest()[:24]
    folders = [data.directory / "lengths", data.cache / "lengths"]
    for folder in folders:
        if (found := _read(folder / name, dtype)) is not None:
            return found
    folder = next((folder for folder in folders if _writable(folder)), None)
    if folder is None:
        raise DataError(f"{folders[0]} and {folders[1]}: neither can be written, and the lengths need a place")
    with _locked(folder / f".{name}.lock"):
        if (found := _read(folder / name, dtype)) is not None:
            return found
        rows, more = compute()
        _write(folder / name, rows, more)
        return _read(folder / name, dtype) or (rows, more)


def is_kept(data: TextSet, fingerprint: str, *, dtype: np.dtype) -> bool:
    """Whether ``kept`` has the table already."""
    name = hashlib.sha256(fingerprint.encode()).hexdigest()[:24]
    return any(_read(folder / "lengths" / name, dtype) is not None for folder in (data.directory, data.cache))


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


@contextmanager
def _locked(path: Path) -> Generator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(path: Path, dtype: np.dtype) -> Table | None:
    try:
        rows = np.load(path.with_suffix(".npy"), mmap_mode="r")
        more = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError, EOFError):
        return None
    return (rows, more) if rows.dtype == dtype else None


def _write(path: Path, rows: np.ndarray, more: Any) -> None:  # noqa: ANN401  (any JSON)
    content = io.BytesIO()
    np.save(content, rows)
    try:
        write_whole(path.with_suffix(".json"), json.dumps(more).encode())
        write_whole(path.with_suffix(".npy"), content.getvalue())
    except OSError as error:
        raise cannot_write(path, error) from None
