"""Walk the members of a tar file by their headers, and refuse what is not whole or not harmless.

Works on any ``read(offset, count)``: a file through ``os.pread``, or the bytes of one sample. Knows ustar, the long
names of GNU tar and the path and size records of pax; links, devices and paths that leave the archive are refused.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from mmit.errors import DataError

BLOCK = 512
END = bytes(BLOCK)

_HEADER = struct.Struct("100s24x12s12x8s1s100x6s82x155s12x")
"""Name, size, checksum, kind, magic and prefix of a ustar header."""
_REGULAR = b"0\x007"
_DIRECTORY = b"5"
_GNU_LONG_NAME = b"L"
_NAMING = b"Lx"  # GNU long name, pax: headers that speak of the next one
_PAX_GLOBAL = b"g"
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a named pipe"}

Read = Callable[[int, int], bytes]


class Member(NamedTuple):
    """One file in a tar: its bytes are [data, data + size); [start, end) holds its headers and padding too."""

    name: str
    start: int
    data: int
    size: int
    end: int


class TarError(DataError):
    """What is wrong with a tar, where; the caller adds the file's name."""

    def __init__(self, offset: int, member: str, reason: str) -> None:
        super().__init__(f"byte {offset}, member '{member}': {reason}")


def members(read: Read, start: int, stop: int, *, whole_archive: bool) -> Iterator[Member]:
    """The files between byte ``start`` and ``stop``, in order.

    whole_archive: the range ends with the end-of-archive marker, which must be there; False: it ends with a member.
    Raises TarError.
    """
    at = begin = start
    name, size_override, last = "", -1, ""
    while at < stop:
        header = read(at, BLOCK)
        if len(header) < BLOCK:
            raise TarError(at, last, "the file ends inside the header that follows this member")
        if header == END:
            if whole_archive:
                _check_end(read, at, last)
            return
        name_field, size_field, sum_field, kind, magic, prefix = _HEADER.unpack(header)
        stored = _number(sum_field, at, last)
        if (_sum(header, sum_field) - stored) % 65521:
            raise TarError(at, last, "no tar header with a right checksum follows this member")
        is_regular = kind in _REGULAR
        size = size_override if is_regular and size_override >= 0 else _number(size_field, at, last)
        data = at + BLOCK
        end = data + (size + BLOCK - 1) // BLOCK * BLOCK
        if not name and (is_regular or kind not in _NAMING + _PAX_GLOBAL):
            name = _name(name_field, prefix if magic == b"ustar\0" else b"", at)
        if end > stop:
            raise TarError(at, name or last, f"cut off: {size} bytes are announced and {max(stop - data, 0)} are there")
        if is_regular:
            _check_path(name, at)
            yield Member(name, begin, data, size, end)
            begin, last, name, size_override = end, name, "", -1
        elif kind in _NAMING:
            name, size_override = _announced(kind, read(data, size), at, name)
        elif kind not in (_DIRECTORY, _PAX_GLOBAL):
            raise TarError(at, name, f"is {_KINDS.get(kind, f'of type {kind!r}')}; only plain files are read")
        else:
            begin, last, name, size_override = end, name or last, "", -1
        at = end
    if whole_archive:
        raise TarError(at, last, "the end-of-archive marker after this member is missing: the file was cut off")


def _sum(header: bytes, sum_field: bytes) -> int:
    """The checksum of a header, modulo 65521."""
    # the low half of adler32 is 1 + the sum of the bytes: the sum of 512 bytes without a Python loop
    return (zlib.adler32(header) & 0xFFFF) - 1 - sum(sum_field) + 8 * 32


def _check_end(read: Read, at: int, last: str) -> None:
    if read(at + BLOCK, BLOCK) != END:
        raise TarError(at, last, "the end-of-archive marker after this member is not whole: the file was cut off")


def _number(field: bytes, at: int, last: str) -> int:
    if field[0] & 0x80:
        return int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    try:
        return int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        raise TarError(at, last, "no tar header follows this member") from None


def _name(field: bytes, prefix: bytes, at: int) -> str:
    name = field.partition(b"\0")[0]
    if prefix[:1] > b"\0":
        name = prefix.partition(b"\0")[0] + b"/" + name
    return _text(name, at)


def _text(name: bytes, at: int) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        raise TarError(at, repr(name)[2:-1], "the name is not UTF-8") from None


def _announced(kind: bytes, records: bytes, at: int, name: str) -> tuple[str, int]:
    """Name and size (-1: none) that a naming header gives to the member after it."""
    if kind == _GNU_LONG_NAME:
        return _text(records.rstrip(b"\0"), at), -1
    size = -1
    while records:
        count, _, rest = records.partition(b" ")
        if not count.isdigit() or not 0 < int(count) <= len(records):
            raise TarError(at, name, "the pax header is malformed")
        key, _, value = rest[: int(count) - len(count) - 2].partition(b"=")
        if key == b"path":
            name = _text(value, at)
        elif key == b"size":
            size = int(value)
        records = records[int(count) :]
    return name, size


def _check_path(name: str, at: int) -> None:
    if name.startswith("/") or (".." in name and ".." in name.split("/")):
        raise TarError(at, name, "the path leaves the archive")
