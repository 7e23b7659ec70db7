"""Remote shards on the local disk: fetched whole, once per host, checked, and thrown out least recently used first.

CACHE/shards/SET/NAME.tar     the shards, at most ``max_bytes`` of all sets together
CACHE/SET/NAME.idx.npy        their indexes, which stay
"""

from __future__ import annotations

import fcntl
import io
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Literal

import numpy as np

from mmit.data.faults import StorageError
from mmit.data.index import ROW, digest, scan, store_index
from mmit.data.remote import download, read_small
from mmit.data.shards import ShardInfo

_PARSING = Lock()
"""Python 3.11 may raise SystemError where two threads parse the headers of arrays (CPython gh-106905)."""


@dataclass(frozen=True)
class ShardCache:
    """A folder of shards that never grows beyond ``max_bytes``. Safe between threads, ranks and loader processes."""

    folder: Path
    max_bytes: int

    def fetch(self, url: str, place: str, *, size: int, sha256: str) -> Path:
        """The local copy of the shard at ``url``, kept at ``place`` within the folder; of several callers one fetches.

        Another process may throw the copy out before it is opened; whoever finds it gone calls again.
        Raises MissingShardError where it cannot be had, StorageError where the disk or the cache is too small.
        """
        target = self.folder / place
        if _is_whole(target, size):
            return target
        if size > self.max_bytes:
            raise StorageError(
                f"{url}: has {size} bytes and the cache holds {self.max_bytes}; raise data.cache_gb above "
                f"{size / 1e9:.3g}, better above that of several shards"
            )
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{target.parent}: the cache cannot be written: {error.strerror}") from None
        with locked(_lock(target), note=str(size)):
            if not _is_whole(target, size):
                self._make_room()
                download(url, target, size=size, sha256=sha256)
        return target

    def _make_room(self) -> None:
        """Throw out shards until all that is here, and all that is being fetched, fits."""
        with locked(self.folder / ".lock"):
            total = sum(_reserved(lock) for lock in self.folder.glob("*/.*.lock"))
            files: list[tuple[float, Path, int]] = []
            for path in [*self.folder.glob("*/*.tar"), *self.folder.glob("*/.*.partial")]:
                with suppress(FileNotFoundError):
                    state = path.stat()
                    own = path.with_name(path.name[1:].removesuffix(".partial")) if path.suffix == ".partial" else path
                    if not _reserved(_lock(own)):
                        files.append((state.st_mtime, path, state.st_size))
            total += sum(size for _, _, size in files)
            for _, path, size in sorted(files):
                if total <= self.max_bytes:
                    return
                path.unlink(missing_ok=True)
                total -= size


@dataclass(frozen=True)
class RemoteShards:
    """The shards of one set behind a URL that ends with ``/``.

    cache: for the tars; place: the folder of this set in it; home: the folder of its indexes.
    """

    url: str
    cache: ShardCache
    place: str
    home: Path

    def fetch(self, shard: ShardInfo) -> Path:
        """The local copy of a shard. Raises StorageError."""
        return self.cache.fetch(
            self.url + shard.file, f"{self.place}/{shard.file}", size=shard.bytes, sha256=shard.sha256
        )

    def discard(self, shard: ShardInfo) -> None:
        """Remove a local copy that turned out to be damaged."""
        (self.cache.folder / self.place / shard.file).unlink(missing_ok=True)

    def index(self, shard: ShardInfo) -> np.ndarray:
        """The rows of a shard's samples: kept from before, or the index that lies beside it, or made from the shard.

        Raises StorageError where neither is what the manifest says.
        """
        name = Path(shard.file).with_suffix(".idx.npy").name
        path = self.home / name
        with suppress(OSError, ValueError, EOFError):
            rows = _load(path, mmap_mode="r")
            if _fits(rows, shard):
                return rows[:-1]
        content = read_small(self.url + name)
        rows = None
        if content is not None:
            with suppress(ValueError, EOFError, OSError):
                rows = _load(io.BytesIO(content))
        if rows is None or not _fits(rows, shard):
            rows = scan(self.fetch(shard))
            if not _fits(rows, shard):
                raise StorageError(
                    f"{self.url}{shard.file}: its members are not those of the manifest; upload it again"
                )
        if store_index(path, rows):
            rows = _load(path, mmap_mode="r")
        return rows[:-1]


def _load(source: Path | io.BytesIO, *, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    with _PARSING:
        return np.load(source, mmap_mode=mmap_mode)


@contextmanager
def locked(path: Path, *, note: str = "") -> Generator[None]:
    """Hold the lock of a file; the kernel lets go of it when the process ends. ``note`` stands in it meanwhile."""
    with path.open("r+" if path.exists() else "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if note:
            lock.seek(0)
            lock.truncate()
            lock.write(note)
            lock.flush()
        yield


def _lock(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


def _reserved(lock: Path) -> int:
    """The bytes that a transfer in progress will need; 0 where nobody holds the lock."""
    try:
        with lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read() or 0)
    except FileNotFoundError:
        pass
    return 0


def _is_whole(target: Path, size: int) -> bool:
    """True where the shard is there, which also marks it as used now."""
    try:
        if target.stat().st_size != size:
            return False
        os.utime(target)
    except OSError:
        return False
    return True


def _fits(rows: np.ndarray, shard: ShardInfo) -> bool:
    return rows.dtype == ROW and rows.ndim == 1 and len(rows) == shard.samples + 1 and digest(rows[:-1]) == shard.index
