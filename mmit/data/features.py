"""What a frozen encoder makes of images, kept on disk by what it was made from: written once, read in every epoch.

A folder holds the features of one encoder with one preprocessing, which ``features.json`` states part by part, so that
a stale folder is refused by the name of what changed. Beside it lie numbered pairs of files:

    000000.features    features in bf16, one image after the other, all tiles of an image together
    000000.index       one ROW for each, written after the features it tells of: half a write is never seen
    covers/            a file for each set of images that was gone through to its end

Every writer takes a number of its own, so that several write at once and a killed one needs no repair.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmit.data.atomic import cannot_write, write_whole
from mmit.data.faults import StorageError
from mmit.errors import DataError

MANIFEST = "features.json"
FORMAT = 1
FILE_BYTES = 2_000_000_000
"""A writer begins a new pair of files beyond this size."""

ROW = np.dtype(
    [("high", "<u8"), ("low", "<u8"), ("offset", "<u8"), ("size", "<u4"), ("tiles", "<u4"), ("check", "<u4")]
)
"""One image: its key in two halves, where its features lie and their CRC-32. Of 0 tiles: why it has none, as text."""

BYTES_PER_VALUE = 2
KEY_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class FeatureKind:
    """What features are made by and their shape: (tiles, ``patches``, ``width``) for an image.

    parts: all that decides them, by name: weights, layer, image size, ...
    """

    parts: Mapping[str, str]
    patches: int
    width: int

    @property
    def tile_bytes(self) -> int:
        """What the features of a tile take on the disk."""
        return self.patches * self.width * BYTES_PER_VALUE

    def key(self, image: bytes, *, look: str = "") -> bytes:
        """The name of an image's features: a hash of all that decides them and of the encoded image.

        look: how the image is looked at, where that does not follow from the image alone.
        """
        return hashlib.sha256(self._digest + look.encode() + b"\0" + image).digest()[:KEY_BYTES]

    @cached_property
    def _digest(self) -> bytes:
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).digest()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"parts": dict(self.parts), "patches": self.patches, "width": self.width}


def open_folder(folder: Path, kind: FeatureKind, *, create: bool) -> None:
    """Make sure that ``folder`` holds features of ``kind``; made where ``create``.

    Raises DataError where it is missing, is no such folder, or its features were made otherwise, saying what changed.
    """
    path = folder / MANIFEST
    if not path.is_file():
        if not create:
            raise DataError(f"{folder}: holds no features ({MANIFEST} is missing); `mmit data cache` makes them")
        if folder.is_dir() and any(folder.iterdir()):
            raise DataError(f"{folder}: is not empty and holds no {MANIFEST}; give the features a folder of their own")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            content = {"format": FORMAT, "dtype": "bfloat16", **kind.to_dict()}
            write_whole(path, json.dumps(content, indent=1).encode())
        except OSError as error:
            raise cannot_write(path, error) from None
    _check_kind(folder, kind)


def _check_kind(folder: Path, kind: FeatureKind) -> None:
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_bytes())
        parts, made_by = dict(found["parts"]), int(found["format"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: unreadable ({error!r}); remove {folder} and make the features again") from None
    if made_by != FORMAT:
        raise DataError(f"{path}: format {made_by}, this mmit reads {FORMAT}; make the features again")
    changed = [
        f"{name} was {parts.get(name, 'not set')} and is {kind.parts.get(name, 'not set')}"
        for name in [*kind.parts, *(name for name in parts if name not in kind.parts)]
        if parts.get(name) != kind.parts.get(name)
    ]
    if changed:
        raise DataError(
            f"{folder}: its features were made otherwise: {'; '.join(changed)}. Set this back, name another folder in "
            "data.features, or remove this one, and run `mmit data cache`"
        )


def index_files(folder: Path) -> list[Path]:
    """The indexes of a folder, the oldest number first."""
    return sorted(folder.glob("*.index"))


def read_rows(index: Path, first: int = 0) -> np.ndarray:
    """The rows of an index from number ``first`` on whose features are there; half a row at the end is left out."""
    try:
        held = index.with_suffix(".features").stat().st_size
        with index.open("rb") as file:
            file.seek(first * ROW.itemsize)
            content = file.read()
    except OSError:
        return np.zeros(0, dtype=ROW)
    rows: np.ndarray = np.frombuffer(content[: len(content) // ROW.itemsize * ROW.itemsize], dtype=ROW)
    return rows[rows["offset"] + rows["size"] <= held]


class FeatureStore:
    """The features of a folder, as they are when it is opened; picklable, and safe to use after a fork.

    Raises DataError as ``open_folder`` does.
    """

    def __init__(self, folder: Path, kind: FeatureKind) -> None:
        open_folder(folder, kind, create=False)
        self.folder = folder
        self.kind = kind
        self._open()

    def _open(self) -> None:
        self._indexes = index_files(self.folder)
        rows = [read_rows(index) for index in self._indexes]
        self._file_of = np.repeat(np.arange(len(rows)), [len(some) for some in rows])
        self._rows = np.concatenate([np.zeros(0, dtype=ROW), *rows])
        order = np.argsort(self._rows["high"], kind="stable")
        self._rows, self._file_of = self._rows[order], self._file_of[order]
        self._high = np.ascontiguousarray(self._rows["high"])
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "kind": self.kind}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __contains__(self, key: bytes) -> bool:
        return self._find(key) is not None

    def read(self, image: bytes, *, look: str = "") -> Tensor:
        """The features of an encoded image (see ``FeatureKind.key``): (tiles, P, D_vision) bf16, by one read.

        Raises DataError with the reason where the encoder could not see the image, StorageError where its features
        are not here or are damaged.
        """
        number = self._find(self.kind.key(image, look=look))
        if number is None:
            raise StorageError(
                f"its features are not in {self.folder}: the picture changed, or the cache was made for other data; "
                "run `mmit data cache` again, or set data.missing_features: compute"
            )
        row = self._rows[number]
        size, tiles = int(row["size"]), int(row["tiles"])
        file = int(self._file_of[number])
        content = bytearray(os.pread(self._descriptor(file), size, int(row["offset"])))
        if len(content) != size or zlib.crc32(content) != int(row["check"]):
            damaged = self._indexes[file].with_suffix(".features")
            raise StorageError(f"{damaged}: damaged; remove it and run `mmit data cache` again")
        if not tiles:
            raise DataError(content.decode())
        return torch.frombuffer(content, dtype=torch.bfloat16).view(tiles, self.kind.patches, self.kind.width)

    def covers(self, images: str) -> bool:
        """True where a set of images, by its fingerprint, was gone through to its end and no features went since."""
        try:
            return len(self) >= int(json.loads((self.folder / "covers" / images).read_bytes())["features"])
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _find(self, key: bytes) -> int | None:
        high, low = halves(key)
        number = int(np.searchsorted(self._high, np.uint64(high)))
        while number < len(self._rows) and self._high[number] == high:
            if self._rows[number]["low"] == low:
                return number
            number += 1
        return None

    def _descriptor(self, file: int) -> int:
        if file not in self._files:
            path = self._indexes[file].with_suffix(".features")
            try:
                self._files[file] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise StorageError(f"{path}: cannot be read: {error.strerror}") from None
        return self._files[file]

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)


def note_covered(store: FeatureStore, images: str, *, what: str) -> None:
    """Write down that a set of images was gone through to its end. Raises DataError."""
    path = store.folder / "covers" / images
    try:
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps({"images of": what, "features": len(store)}).encode())
    except OSError as error:
        raise cannot_write(path, error) from None


def halves(key: bytes) -> tuple[int, int]:
    """A key as two numbers, as a row holds it."""
    return int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")
