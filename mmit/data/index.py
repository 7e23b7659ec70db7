"""The index of a shard: where each sample lies, so that any of them costs one read.

``NAME.idx.npy`` beside ``NAME.tar`` is a cache: it is rebuilt from the headers (about 20 us a sample) whenever it is
missing or the tar is not the one it was made from. It is memory-mapped, so all workers share it.
"""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np

from mmit.data.atomic import write_whole
from mmit.data.faults import StorageError
from mmit.data.tar_scan import BLOCK, END, Member, TarError, members

_SPAN = [("offset", "<u8"), ("nbytes", "<u4"), ("check", "<u4"), ("images", "<u4")]
_PLACES = [("json", "<u4"), ("json_bytes", "<u4"), ("json_check", "<u4"), ("image", "<u4"), ("image_bytes", "<u4")]
ROW = np.dtype(_SPAN + _PLACES)
"""One sample: the span of its members, a checksum of its first header, its number of images; and for a sample of one
JSON and at most one image where these lie in the span, and a checksum of the JSON's header, so that the other headers
need no reading (else zeros).

The last row is no sample: offset is the size of the tar, nbytes the bytes after the last member, check the low half of
its time of modification.
"""

_ELSEWHERE = (0, 0, 0, 0, 0)

IMAGE_TYPES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm"})


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension of a member, as webdataset splits them; None for a file outside the convention."""
    slash = name.rfind("/")
    dot = name.find(".", slash + 1)
    if dot <= slash + 1 or name[slash + 1 :].startswith("__"):
        return None
    return name[:dot], name[dot + 1 :].lower()


@lru_cache(maxsize=1024)
def image_number(extension: str) -> int | None:
    """Which image of its sample a member is (``1.jpg`` is 1, ``jpg`` is 0), or None where it is none."""
    number, _, kind = extension.rpartition(".")
    if kind not in IMAGE_TYPES or not (number == "" or number.isdecimal()):
        return None
    return int(number or 0)


def load_index(tar: Path, *, cache: Path) -> tuple[np.ndarray, bool]:
    """The rows of ``tar``'s samples, memory-mapped, and whether they had to be made anew.

    cache: folder for the index where the tar's own cannot be written. Raises DataError naming shard, byte and member.
    """
    for folder in (tar.parent, cache):
        rows = _read_fresh(folder / f"{tar.stem}.idx.npy", tar)
        if rows is not None:
            return rows[:-1], False
    rows = scan(tar)
    for folder in (tar.parent, cache):
        path = folder / f"{tar.stem}.idx.npy"
        if store_index(path, rows):
            return np.load(path, mmap_mode="r")[:-1], True
    return rows[:-1], True


def scan(tar: Path) -> np.ndarray:
    """The index of a tar, read from its headers. Raises DataError naming shard, byte and member."""
    try:
        file = os.open(tar, os.O_RDONLY)
    except OSError as error:
        raise StorageError(f"{tar}: cannot be opened: {error.strerror}") from None
    try:
        state = os.fstat(file)
        rows = list(_samples(file, state.st_size))
        end = rows[-1][0] + rows[-1][1] if rows else 0
        rows.append((state.st_size, state.st_size - end, state.st_mtime_ns & 0xFFFFFFFF, 0, *_ELSEWHERE))
    except TarError as fault:
        hint = "; it is compressed: unpack it first" if _is_compressed(file) else ""
        raise StorageError(f"{tar}: {fault}{hint}") from None
    finally:
        os.close(file)
    return np.array(rows, dtype=ROW)


def store_index(path: Path, rows: np.ndarray) -> bool:
    """Write an index whole or not at all; False where the folder cannot be written."""
    content = io.BytesIO()
    np.save(content, rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content.getvalue())
    except OSError:
        return False
    return True


def digest(rows: np.ndarray) -> str:
    """A hash of what an index says: it changes with any name, size or order in the tar."""
    spans = np.empty(len(rows), dtype=_SPAN)
    for name, _ in _SPAN:
        spans[name] = rows[name]
    return hashlib.sha256(spans.tobytes()).hexdigest()


def _samples(file: int, size: int) -> Iterator[tuple[int, ...]]:
    seen: set[str] = set()
    found: dict[str, Member] = {}
    key, start, end = "", 0, 0

    def row() -> tuple[int, ...]:
        if end - start >= 1 << 32:
            raise TarError(start, key, "a sample of 4 GiB or more")
        images = sum(image_number(extension) is not None for extension in found)
        return start, end - start, zlib.crc32(os.pread(file, BLOCK, start)), images, *_places(file, found, start)

    for member in members(lambda at, count: os.pread(file, count, at), 0, size, whole_archive=True):
        split = split_name(member.name)
        if split is None:
            continue
        if split[0] != key:
            if key:
                yield row()
            key, start = split[0], member.start
            if key in seen:
                raise TarError(member.start, member.name, f"the key '{key}' comes again: its members are not together")
            seen.add(key)
            found = {}
        if split[1] in found:
            raise TarError(member.start, member.name, "this member comes twice")
        found[split[1]] = member
        end = member.end
    if key:
        yield row()


def _places(file: int, found: Mapping[str, Member], start: int) -> tuple[int, ...]:
    """Where JSON and image lie in a sample that has no other text and no other image."""
    images = [member for extension, member in found.items() if image_number(extension) is not None]
    if "json" not in found or "txt" in found or len(images) > 1:
        return _ELSEWHERE
    text = found["json"]
    place, size = (images[0].data - start, images[0].size) if images else (0, 0)
    return text.data - start, text.size, zlib.crc32(os.pread(file, BLOCK, text.data - BLOCK)), place, size


def _is_compressed(file: int) -> bool:
    head = os.pread(file, 6, 0)
    return head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"))


def _read_fresh(path: Path, tar: Path) -> np.ndarray | None:
    """The rows at ``path`` where they are an index of ``tar`` as it is now."""
    try:
        rows = np.load(path, mmap_mode="r")
        state = tar.stat()
    except (OSError, ValueError, EOFError):
        return None
    if rows.dtype != ROW or rows.ndim != 1 or not len(rows):
        return None
    size, tail, check, *_ = rows[-1].tolist()
    if size != state.st_size or check != state.st_mtime_ns & 0xFFFFFFFF:
        return None
    try:
        with tar.open("rb") as file:
            file.seek(size - tail)
            return rows if file.read(2 * BLOCK) == 2 * END else None
    except OSError:
        return None
