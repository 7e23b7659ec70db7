"""Read shards: any sample by its number, with one read, from any process.

Opens directories that mmit wrote and any webdataset tars that follow the convention (``KEY.jpg`` with ``KEY.txt`` or
``KEY.json``), with or without a manifest.
"""

from __future__ import annotations

import hashlib
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmit.conversation import Conversation
from mmit.data import quarantine, stored
from mmit.data.faults import StorageError
from mmit.data.index import digest, image_number, load_index, split_name
from mmit.data.local_shards import check_size, local_set
from mmit.data.quarantine import QUARANTINE
from mmit.data.remote import is_remote, read_small
from mmit.data.shard_cache import RemoteShards, ShardCache
from mmit.data.shard_files import ShardFiles
from mmit.data.shards import MANIFEST, Manifest, ShardInfo
from mmit.data.tar_scan import BLOCK, Member, Read, TarError, members
from mmit.errors import DataError

CACHE = Path("~/.cache/mmit")
"""Where remote shards go, and indexes and length tables when the folder of the shards cannot be written."""
CACHE_BYTES = 100_000_000_000
"""Bytes of remote shards that are kept, unless the caller says otherwise."""


class SampleSet(Protocol):
    """What plan and loader need of a data set; blocks: see ``ShardSet``."""

    name: str
    fingerprint: str
    blocks: Sequence[int]

    def __len__(self) -> int: ...

    def read(self, number: int) -> Conversation:
        """The sample with its images."""
        ...

    def place(self, number: int) -> tuple[str, str]:
        """Shard and key of the sample."""
        ...


def open_source(path: str | Path, *, cache: Path = CACHE, cache_bytes: int = CACHE_BYTES) -> ShardSet:
    """The samples of a directory of tars, of one tar, of a pattern such as ``photos/*.tar``, or behind a URL.

    A URL (https, s3, gs, ... as fsspec knows them) is that of a folder with a manifest; its shards are fetched when
    they are read and kept in ``cache``, at most ``cache_bytes`` of them.
    Raises DataError for a set that is missing, empty, unfinished, or not what its manifest says.
    """
    if is_remote(path):
        return _open_remote(f"{path}".removesuffix(MANIFEST).rstrip("/") + "/", cache.expanduser(), cache_bytes)
    location, tars, manifest = local_set(path)
    directory = location if location.is_dir() else location.parent
    name = manifest.name if manifest else (location.stem if location.is_file() else directory.resolve().name)
    found = ShardSet(name, directory, tars, manifest, cache.expanduser() / _folder(str(directory.resolve())))
    return _not_empty(found, path)


def one_shard(tar: Path) -> ShardSet:
    """The samples of one tar, whatever a manifest says of it. Raises StorageError."""
    return ShardSet(tar.stem, tar.parent, [tar], None, CACHE.expanduser() / _folder(str(tar.parent.resolve())))


def _open_remote(url: str, cache: Path, cache_bytes: int) -> ShardSet:
    content = read_small(url + MANIFEST)
    if content is None:
        raise DataError(f"{url}: there is no {MANIFEST} here; upload the whole folder that `mmit data convert` wrote")
    manifest = Manifest.parse(content, where=url + MANIFEST)
    left_out = read_small(url + QUARANTINE)
    home = cache / _folder(url)
    remote = RemoteShards(url, ShardCache(cache / "shards", cache_bytes), home.name, home)
    with ThreadPoolExecutor(8) as pool:  # thousands of small files, most of the time spent waiting
        list(pool.map(remote.index, manifest.shards))
    tars = [cache / "shards" / home.name / shard.file for shard in manifest.shards]
    left_out_text = "" if left_out is None else left_out.decode("utf-8", errors="replace")
    return _not_empty(ShardSet(manifest.name, home, tars, manifest, home, remote=remote, left_out=left_out_text), url)


def _folder(location: str) -> str:
    return hashlib.sha256(location.encode()).hexdigest()[:16]


def _not_empty(found: ShardSet, path: str | Path) -> ShardSet:
    if not len(found):
        raise DataError(f"{path}: the shards hold no samples")
    return found


_STATE = ("name", "directory", "tars", "manifest", "cache", "remote", "left_out")


class ShardSet:
    """The samples of some shards, numbered through; picklable, and safe to use after a fork.

    name: of the data set; fingerprint: changes with any shard; directory: of the shards; cache: where what is
    computed about them goes when ``directory`` cannot be written; quarantined: the numbers of the samples that
    ``quarantine.txt`` leaves out of training; blocks: samples of each shard where they are to be read some shards at a
    time, else nothing. remote, left_out: where they are fetched from, and its quarantine.txt.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        tars: list[Path],
        manifest: Manifest | None,
        cache: Path,
        *,
        remote: RemoteShards | None = None,
        left_out: str = "",
    ) -> None:
        self.name = name
        self.directory = directory
        self.tars = tars
        self.manifest = manifest
        self.cache = cache
        self.remote = remote
        path = directory / QUARANTINE
        self.left_out = path.read_text(encoding="utf-8") if remote is None and path.is_file() else left_out
        self._open()

    def _open(self) -> None:
        self._rows: list[np.ndarray] = []
        digests = []
        for number, tar in enumerate(self.tars):
            rows = self._index(number, tar)
            self._rows.append(np.asarray(rows))  # still mapped; a memmap object takes longer to give out a row
            digests.append(self.manifest.shards[number].sha256 if self.manifest else f"{tar.name} {digest(rows)}")
        self._files = ShardFiles(self.tars, self.remote, self.manifest.shards if self.manifest else ())
        self._starts = np.cumsum([0] + [len(rows) for rows in self._rows]).tolist()
        self.fingerprint = hashlib.sha256("\n".join(digests).encode()).hexdigest()
        self.blocks: Sequence[int] = [len(rows) for rows in self._rows] if self.remote else ()
        where = f"{self.remote.url if self.remote else f'{self.directory}/'}{QUARANTINE}"
        rows_of = {tar.name: (self._starts[n], self._rows[n]) for n, tar in enumerate(self.tars)}
        self.quarantined = quarantine.numbers(quarantine.read(self.left_out, where=where), rows_of, where=where)

    def _index(self, number: int, tar: Path) -> np.ndarray:
        stated = self.manifest.shards[number] if self.manifest else None
        if self.remote is not None and stated is not None:
            return self.remote.index(stated)
        check_size(tar, stated.bytes if stated else None)
        rows, made = load_index(tar, cache=self.cache)
        if stated and made and digest(rows) != stated.index:
            raise StorageError(
                f"{tar}: was replaced: its members are not those of the manifest; convert the data set again"
            )
        return rows

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key in _STATE}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    @property
    def size(self) -> int:
        """Size of all shards."""
        if self.manifest is not None:
            return sum(shard.bytes for shard in self.manifest.shards)
        return sum(tar.stat().st_size for tar in self.tars)

    @property
    def images(self) -> np.ndarray:
        """Number of images of every sample, (len,) uint32."""
        return np.concatenate([rows["images"] for rows in self._rows])

    def entry(self, number: int, reason: str) -> quarantine.Entry:
        """The line of ``quarantine.txt`` that leaves a sample out."""
        shard, row = self._locate(number)
        check = int(self._rows[shard][row]["check"])
        return quarantine.Entry(self.tars[shard].name, row, check, self.place(number)[1], reason)

    def place(self, number: int) -> tuple[str, str]:
        """File name of the shard and key of a sample, for messages; the key is ``?`` where it cannot be read."""
        shard, row = self._locate(number)
        offset = int(self._rows[shard][row]["offset"])
        try:
            first = next(
                members(lambda at, count: self._files.read(shard, count, at), offset, 1 << 62, whole_archive=False)
            )
        except (TarError, StorageError, StopIteration):
            return self.tars[shard].name, "?"
        return self.tars[shard].name, (split_name(first.name) or ("?", ""))[0]

    def shard_of(self, number: int) -> ShardInfo:
        """What the manifest of a remote set says of the shard that a sample lies in."""
        assert self.manifest is not None, "a remote set has one"
        return self.manifest.shards[self._locate(number)[0]]

    def read(self, number: int) -> Conversation:
        """The sample with its images: one read for the JSON, one for each image.

        Raises SampleError for a broken sample, StorageError for a shard that cannot be read or was replaced.
        """
        shard, row = self._locate(number)
        places = self._rows[shard].item(row)
        offset, count, check, image_count, json, *_, image, image_bytes = places
        if json:
            pictures = (self._files.read(shard, image_bytes, offset + image),) if image_count else ()
            own = self._own(shard, places, pictures)
            if own is not None:
                return own
        span = self._files.read(shard, count, offset)
        self._check(span[:BLOCK], check, shard)

        def read(at: int, size: int) -> bytes:
            return span[at - offset : at - offset + size]

        key, text, images = _by_kind(self._members(shard, offset, offset + count, read))
        images.sort()
        pictures = tuple([read(member.data, member.size) for _, member in images])
        texts = {kind: read(member.data, member.size) for kind, member in text.items()}
        return stored.whole(texts, pictures, key=key, source=self.name)

    def read_text(self, number: int) -> Conversation:
        """The sample without the bytes of its images where their sizes are stored: reads headers and JSON only.

        Raises as ``read`` does.
        """
        shard, row = self._locate(number)
        places = self._rows[shard].item(row)
        offset, count, check, _, json, *_ = places
        if json:
            own = self._own(shard, places, ())
            if own is not None:
                return own

        def read(at: int, size: int) -> bytes:
            return self._files.read(shard, size, at)

        self._check(read(offset, BLOCK), check, shard)
        key, text, images = _by_kind(self._members(shard, offset, offset + count, read))
        texts = {kind: read(member.data, member.size) for kind, member in text.items()}
        found = stored.without_images(texts, image_count=len(images), key=key, source=self.name)
        return self.read(number) if found is None else found

    def _own(self, shard: int, places: tuple[int, ...], images: tuple[bytes, ...]) -> Conversation | None:
        """The conversation in a sample whose JSON mmit wrote, else None. places: its row of the index."""
        offset, _, _, image_count, json, size, check, *_ = places
        content = self._files.read(shard, BLOCK + size, offset + json - BLOCK)
        self._check(content[:BLOCK], check, shard)
        return stored.own(content[BLOCK:], images, image_count=image_count, source=self.name)

    def _locate(self, number: int) -> tuple[int, int]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard = bisect_right(self._starts, number) - 1
        return shard, number - self._starts[shard]

    def _members(self, shard: int, start: int, stop: int, read: Read) -> list[Member]:
        try:
            return list(members(read, start, stop, whole_archive=False))
        except TarError as fault:
            raise StorageError(f"{self.tars[shard]}: {fault}; the shard changed after it was indexed") from None

    def _check(self, header: bytes, check: int, shard: int) -> None:
        if zlib.crc32(header) != check:
            raise StorageError(f"{self.tars[shard]}: changed after it was indexed; start again, or restore the shard")


def _by_kind(found: Sequence[Member]) -> tuple[str, dict[str, Member], list[tuple[int, Member]]]:
    """Key, text members by kind, and numbered images of a sample."""
    key, text, images = "", {}, []
    for member in found:
        split = split_name(member.name)
        if split is None:
            continue
        key, extension = split
        if extension in ("json", "txt"):
            text[extension] = member
        elif (image := image_number(extension)) is not None:
            images.append((image, member))
    return key, text, images
