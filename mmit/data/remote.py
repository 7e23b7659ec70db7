"""Files behind a URL: http(s) with the standard library, anything else through fsspec (s3, gs, ...).

Everything is tried several times, each time after a longer and slightly random wait, and a transfer that broke off
goes on where it stopped. What finally does not come is an error with the URL in it.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import random
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar, cast
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from mmit.data.atomic import cannot_write
from mmit.data.faults import MissingShardError, StorageError
from mmit.errors import ConfigError, MissingExtra

ATTEMPTS = 6
FIRST_WAIT = 0.5
"""Seconds before the second attempt; each later wait is twice as long (15 s in all), times 0.5 to 1.5."""
TIMEOUT = 30.0
"""Seconds without a byte after which an attempt has failed."""
CHUNK = 1 << 20

_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
_NOT_THERE = (404, 410)
_RANGE_NOT_SATISFIABLE = 416

Result = TypeVar("Result")


def is_remote(path: str | Path) -> bool:
    """True for a URL, other than one of a local file."""
    return "://" in str(path) and not str(path).startswith("file://")


def read_small(url: str) -> bytes | None:
    """The content of a small file; None where there is none. Raises StorageError where it cannot be had."""

    def attempt() -> bytes | None:
        try:
            with _stream(url, 0) as (stream, _):
                return stream.read()
        except FileNotFoundError:
            return None

    try:
        return _tried(attempt)
    except OSError as error:
        raise StorageError(f"{url}: cannot be fetched ({_reason(error)}), tried {ATTEMPTS} times") from None


def download(url: str, target: Path, *, size: int, sha256: str) -> None:
    """Put the file at ``url`` at ``target``, whole and of this size and checksum, or not at all.

    The caller holds a lock on ``target``. Raises MissingShardError where it cannot be had, StorageError where
    the disk is full.
    """
    partial = target.with_name(f".{target.name}.partial")

    def attempt() -> None:
        have = partial.stat().st_size if partial.exists() else 0
        if have < size:
            have = _append(url, partial, have, size)
        if have != size:
            if have > size:
                partial.unlink()
            raise ConnectionError(f"{have if have < size else f'more than {size}'} of {size} bytes came")
        with partial.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                partial.unlink()
                raise ConnectionError("its content is not what the manifest says (SHA-256)")
        os.replace(partial, target)

    try:
        _tried(attempt)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise MissingShardError(f"{url}: cannot be fetched ({_reason(error)}), tried {ATTEMPTS} times") from None


def _append(url: str, partial: Path, have: int, size: int) -> int:
    """Fetch what is missing behind the first ``have`` bytes; the bytes that are there then."""
    try:
        with _stream(url, have) as (stream, start), _opened(partial) as file:
            file.truncate(start)
            file.seek(start)
            there = start
            while there <= size and (chunk := stream.read(CHUNK)):
                _write(file, chunk, partial)
                there += len(chunk)
            return there
    except HTTPError as error:
        if error.code == _RANGE_NOT_SATISFIABLE:  # the file there is shorter than what is here
            partial.unlink(missing_ok=True)
        raise


def _tried(attempt: Callable[[], Result]) -> Result:
    """The result of the first attempt that succeeds; the OSError of the last one."""
    for number in range(ATTEMPTS - 1):
        try:
            return attempt()
        except OSError:
            time.sleep(FIRST_WAIT * 2**number * random.uniform(0.5, 1.5))  # noqa: S311  (spreads ranks, no secret)
    return attempt()


@contextmanager
def _stream(url: str, start: int) -> Generator[tuple[BinaryIO, int]]:
    """A stream of a file and the byte it begins at: ``start``, or 0 where the server sends the whole.

    Raises OSError, FileNotFoundError where there is no such file.
    """
    if not url.startswith(("http://", "https://")):
        with _fsspec_stream(url, start) as stream:
            yield stream, start
        return
    headers = {"User-Agent": "mmit"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        with urlopen(Request(url, headers=headers), timeout=TIMEOUT) as response:  # noqa: S310  (http or https only)
            resumed = str(response.headers.get("Content-Range", "")).startswith(f"bytes {start}-")
            yield (
                cast("BinaryIO", response),
                start if response.status == http.HTTPStatus.PARTIAL_CONTENT and resumed else 0,
            )
    except HTTPError as error:
        error.close()
        if error.code in _NOT_THERE:
            raise FileNotFoundError(error.code, f"HTTP {error.code} {error.reason}") from None
        raise
    except http.client.HTTPException as error:
        raise ConnectionError(f"{type(error).__name__}: {error}") from None


@contextmanager
def _fsspec_stream(url: str, start: int) -> Generator[BinaryIO]:
    protocol = url.partition("://")[0]
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise MissingExtra("fsspec", "remote", f"reading {url}") from error
    try:
        system, path = url_to_fs(url)
    except ImportError as error:
        if protocol not in _PACKAGES:
            raise ConfigError(f"{url}: {error}") from error
        raise MissingExtra(_PACKAGES[protocol], "remote", f"reading {url}") from error
    except ValueError as error:
        raise ConfigError(f"{url}: '{protocol}' is no protocol that fsspec knows ({error})") from None
    try:
        with system.open(path, "rb") as file:
            file.seek(start)
            yield file
    except (OSError, StorageError):
        raise
    except Exception as error:  # each store has errors of its own that are no OSError
        raise ConnectionError(f"{type(error).__name__}: {error}") from error


@contextmanager
def _opened(partial: Path) -> Generator[BinaryIO]:
    try:
        partial.touch()
        file = partial.open("r+b", buffering=0)
    except OSError as error:
        raise _disk(partial, error) from None
    with file:
        yield cast("BinaryIO", file)


def _write(file: BinaryIO, chunk: bytes, partial: Path) -> None:
    try:
        left = memoryview(chunk)
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise _disk(partial, error) from None


def _disk(partial: Path, error: OSError) -> StorageError:
    """The error of this disk: trying the transfer again would not help."""
    return StorageError(str(cannot_write(partial, error)))


def _reason(error: OSError) -> str:
    if isinstance(error, HTTPError):
        return f"HTTP {error.code} {error.reason}"
    return error.strerror or str(error) or type(error).__name__
