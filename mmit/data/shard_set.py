"""Read shards: any sample by its number, with one read, from any process.

Opens directories that mmit wrote and any webdataset tars that follow the convention (``KEY.jpg`` with ``KEY.txt`` or
``KEY.json``), with or without a manifest.
"""

from __future__ import annotations

import glob
import hashlib
import os
import time
import zlib
from bisect import bisect_right
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmit.conversation import Conversation
from mmit.data import stored
from mmit.data.faults import StorageError
from mmit.data.index import digest, image_number, load_index, split_name
from mmit.data.shards import MANIFEST, Manifest
from mmit.data.tar_scan import BLOCK, Member, Read, TarError, members
from mmit.errors import DataError

OPEN_FILES = 64
RETRIES = 3
CACHE = Path("~/.cache/mmit")
"""Where indexes and length tables go when the folder of the shards cannot be written."""


class SampleSet(Protocol):
    """What plan and loader need of a data set."""

    name: str
    fingerprint: str

    def __len__(self) -> int: ...

    def read(self, number: int) -> Conversation:
        """The sample with its images."""
        ...

    def place(self, number: int) -> tuple[str, str]:
        """Shard and key of the sample."""
        ...


def open_source(path: str | Path, *, cache: Path = CACHE) -> ShardSet:
    """The samples of a directory of tars, of one tar, or of a pattern such as ``photos/*.tar``.

    Raises DataError for a set that is missing, empty, unfinished, or not what its manifest says.
    """
    location = Path(path).expanduser()
    directory = location if location.is_dir() else location.parent
    manifest = Manifest.read(location) if (location / MANIFEST).is_file() else None
    if manifest is not None:
        tars = [location / shard.file for shard in manifest.shards]
    elif location.is_dir():
        tars = sorted(location.glob("*.tar"))
    else:
        tars = sorted(Path(name) for name in glob.glob(str(location)))
    if not tars:
        unfinished = location.with_name(location.name + ".partial")
        hint = (
            f"; {unfinished} is an unfinished conversion: run the same `mmit data convert` again"
            if unfinished.is_dir()
            else ""
        )
        raise DataError(f"{path}: no shards (*.tar) here{hint}")
    if directory.name.endswith(".partial"):
        raise DataError(f"{path}: an unfinished conversion; run the same `mmit data convert` again to finish it")
    home = cache.expanduser() / hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]
    found = ShardSet(
        manifest.name if manifest else (location.stem if location.is_file() else directory.resolve().name),
        directory,
        tars,
        manifest,
        home,
    )
    if not len(found):
        raise DataError(f"{path}: the shards hold no samples")
    return found


class ShardSet:
    """The samples of some shards, numbered through; picklable, and safe to use after a fork.

    name: of the data set; fingerprint: changes with any shard; directory: of the shards; cache: where what is
    computed about them goes when ``directory`` cannot be written.
    """

    def __init__(self, name: str, directory: Path, tars: list[Path], manifest: Manifest | None, cache: Path) -> None:
        self.name = name
        self.directory = directory
        self.tars = tars
        self.manifest = manifest
        self.cache = cache
        self._open()

    def _open(self) -> None:
        self._files: OrderedDict[int, int] = OrderedDict()
        self._rows: list[np.ndarray] = []
        digests = []
        for number, tar in enumerate(self.tars):
            stated = self.manifest.shards[number] if self.manifest else None
            if not tar.is_file():
                raise StorageError(f"{tar}: the shard is missing")
            if stated and tar.stat().st_size != stated.bytes:
                raise StorageError(
                    f"{tar}: has {tar.stat().st_size} bytes where the manifest says {stated.bytes}: "
                    "it was cut or replaced; copy it or convert the data set again"
                )
            rows, made = load_index(tar, cache=self.cache)
            if stated and made and digest(rows) != stated.index:
                raise StorageError(
                    f"{tar}: was replaced: its members are not those of the manifest; convert the data set again"
                )
            self._rows.append(rows)
            digests.append(stated.sha256 if stated else f"{tar.name} {digest(rows)}")
        self._starts = np.cumsum([0] + [len(rows) for rows in self._rows]).tolist()
        self.fingerprint = hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("name", "directory", "tars", "manifest", "cache")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    @property
    def images(self) -> np.ndarray:
        """Number of images of every sample, (len,) uint32."""
        return np.concatenate([rows["images"] for rows in self._rows])

    def place(self, number: int) -> tuple[str, str]:
        """File name of the shard and key of a sample, for messages; the key is ``?`` where it cannot be read."""
        shard, row = self._locate(number)
        offset = int(self._rows[shard][row]["offset"])
        try:
            first = next(members(lambda at, count: self._pread(shard, count, at), offset, 1 << 62, whole_archive=False))
        except (TarError, StorageError, StopIteration):
            return self.tars[shard].name, "?"
        return self.tars[shard].name, (split_name(first.name) or ("?", ""))[0]

    def read(self, number: int) -> Conversation:
        """The sample with its images: one read.

        Raises SampleError for a broken sample, StorageError for a shard that cannot be read or was replaced.
        """
        shard, row = self._locate(number)
        offset, count, check, _ = self._rows[shard][row].tolist()
        span = self._pread(shard, count, offset)
        self._check(span[:BLOCK], check, shard)

        def read(at: int, size: int) -> bytes:
            return span[at - offset : at - offset + size]

        key, text, images = self._members(shard, offset, offset + count, read)
        pictures = tuple(read(member.data, member.size) for _, member in sorted(images))
        texts = {kind: read(member.data, member.size) for kind, member in text.items()}
        return stored.whole(texts, pictures, key=key, source=self.name)

    def read_text(self, number: int) -> Conversation:
        """The sample without the bytes of its images where their sizes are stored: reads headers and JSON only.

        Raises as ``read`` does.
        """
        shard, row = self._locate(number)
        offset, count, check, _ = self._rows[shard][row].tolist()

        def read(at: int, size: int) -> bytes:
            return self._pread(shard, size, at)

        self._check(read(offset, BLOCK), check, shard)
        key, text, images = self._members(shard, offset, offset + count, read)
        texts = {kind: read(member.data, member.size) for kind, member in text.items()}
        found = stored.without_images(texts, image_count=len(images), key=key, source=self.name)
        return self.read(number) if found is None else found

    def _locate(self, number: int) -> tuple[int, int]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard = bisect_right(self._starts, number) - 1
        return shard, number - self._starts[shard]

    def _members(
        self, shard: int, start: int, stop: int, read: Read
    ) -> tuple[str, dict[str, Member], list[tuple[int, Member]]]:
        """Key, text members by kind, and numbered images of the sample in a span."""
        key, text, images = "", {}, []
        try:
            for member in members(read, start, stop, whole_archive=False):
                split = split_name(member.name)
                if split is None:
                    continue
                key, extension = split
                if extension in ("json", "txt"):
                    text[extension] = member
                elif (image := image_number(extension)) is not None:
                    images.append((image, member))
        except TarError as fault:
            raise StorageError(f"{self.tars[shard]}: {fault}; the shard changed after it was indexed") from None
        return key, text, images

    def _check(self, header: bytes, check: int, shard: int) -> None:
        if zlib.crc32(header) != check:
            raise StorageError(f"{self.tars[shard]}: changed after it was indexed; start again, or restore the shard")

    def _pread(self, shard: int, count: int, offset: int) -> bytes:
        """Bytes of a shard; an I/O error is tried again, then it is final."""
        for attempt in range(RETRIES + 1):
            try:
                content = os.pread(self._file(shard), count, offset)
            except OSError as error:
                if attempt == RETRIES:
                    raise StorageError(
                        f"{self.tars[shard]}: cannot be read ({error.strerror}), tried {RETRIES + 1} times"
                    ) from None
                self._close(shard)
                time.sleep(0.1 * 4**attempt)
                continue
            if len(content) != count:
                raise StorageError(
                    f"{self.tars[shard]}: ends before byte {offset + count}; it was cut after it was indexed"
                )
            return content
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _file(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        while len(self._files) >= OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = os.open(self.tars[shard], os.O_RDONLY)
        return self._files[shard]

    def _close(self, shard: int) -> None:
        file = self._files.pop(shard, None)
        if file is not None:
            os.close(file)

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)
