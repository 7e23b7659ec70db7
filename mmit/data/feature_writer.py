"""Write features into a folder (see ``features``), beside other writers and after killed ones."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import torch
from torch import Tensor

from mmit.data.atomic import cannot_write
from mmit.data.features import BYTES_PER_VALUE, FILE_BYTES, KEY_BYTES, ROW, halves, index_files, read_rows


class FeatureWriter:
    """Adds features to a folder, into files of its own; a context manager.

    Knows what the folder holds, also what others have added when ``look_around`` was last called.
    Writing raises DataError where the disk refuses.
    """

    def __init__(self, folder: Path, *, file_bytes: int = FILE_BYTES) -> None:
        self._folder = folder
        self._file_bytes = file_bytes
        self._known: set[bytes] = set()
        self._seen: dict[Path, int] = {}
        self._pair: tuple[IO[bytes], IO[bytes]] | None = None
        self.look_around()

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._close()

    def __contains__(self, key: bytes) -> bool:
        return key in self._known

    def look_around(self) -> None:
        """Learn what other writers have added."""
        for index in index_files(self._folder):
            rows = read_rows(index, self._seen.get(index, 0))
            self._seen[index] = self._seen.get(index, 0) + len(rows)
            keys = np.stack([rows["high"], rows["low"]], axis=1).tobytes()
            self._known.update(keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES))

    def add(self, key: bytes, features: Tensor) -> None:
        """Keep the features (tiles, P, D_vision) of an image, rounded to bf16."""
        stored = features.detach().to(device="cpu", dtype=torch.bfloat16).contiguous()
        assert stored.numel() * BYTES_PER_VALUE < 2**32, "no image has so many tiles"
        self._write(key, stored.view(torch.uint8).numpy().tobytes(), tiles=stored.shape[0])

    def refuse(self, key: bytes, reason: str) -> None:
        """Note that the encoder cannot see an image, and why."""
        self._write(key, reason.encode(), tiles=0)

    def _write(self, key: bytes, content: bytes, *, tiles: int) -> None:
        if key in self._known:
            return
        try:
            features, index = self._files()
            offset = features.tell()
            features.write(content)
            features.flush()
            row = (*halves(key), offset, len(content), tiles, zlib.crc32(content))
            index.write(np.array([row], dtype=ROW).tobytes())
            index.flush()
        except OSError as error:
            raise cannot_write(self._folder, error) from None
        self._known.add(key)

    def _files(self) -> tuple[IO[bytes], IO[bytes]]:
        if self._pair is not None and self._pair[0].tell() >= self._file_bytes:
            self._close()
        if self._pair is None:
            taken = max((int(path.stem) for path in self._folder.glob("*.features")), default=-1)
            self._pair = self._claim(taken + 1)
        return self._pair

    def _claim(self, number: int) -> tuple[IO[bytes], IO[bytes]]:
        """The first pair of files from ``number`` on that nobody else has."""
        while True:
            path = self._folder / f"{number:06d}.features"
            try:
                features = path.open("xb")
            except FileExistsError:
                number += 1
                continue
            return features, path.with_suffix(".index").open("wb")

    def _close(self) -> None:
        if self._pair is None:
            return
        for file in self._pair:
            os.fsync(file.fileno())
            file.close()
        self._pair = None
