"""Write shards: plain webdataset tars, byte for byte the same for the same samples, and their manifest.

NAME/manifest.json          written last
NAME/shard-000000.tar       KEY.json, KEY.0.jpg, KEY.1.png, ... for every sample
NAME/shard-000000.idx.npy   the index, a cache
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

from mmit.conversation import Conversation
from mmit.data import stored
from mmit.data.atomic import cannot_write, write_whole
from mmit.data.faults import StorageError
from mmit.data.index import digest, load_index

FORMAT = "mmit-shards-1"
MANIFEST = "manifest.json"
KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")

_MAGIC = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
)


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """What the manifest says about one shard; ``index`` is the digest of its index (names, order, sizes)."""

    file: str
    bytes: int
    sha256: str
    index: str
    samples: int
    images: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a finished conversion is: its shards, totals, what was left out (bad, or skipped on purpose), its source."""

    name: str
    created_by: str
    shards: tuple[ShardInfo, ...]
    totals: Mapping[str, int]
    recipe_digest: str
    source: str
    licence: str = ""
    bad: tuple[Mapping[str, str], ...] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)
    format: str = field(default=FORMAT)

    def write(self, directory: Path) -> None:
        """Put it into ``directory``, whole or not at all. Raises DataError."""
        path = directory / MANIFEST
        try:
            write_whole(path, json.dumps(asdict(self), indent=1, ensure_ascii=False).encode("utf-8"))
        except OSError as error:
            raise cannot_write(path, error) from None

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """The manifest in ``directory``. Raises DataError."""
        path = directory / MANIFEST
        try:
            content = path.read_bytes()
        except OSError as error:
            raise StorageError(f"{path}: cannot be read ({error}); convert the data set again") from None
        return cls.parse(content, where=str(path))

    @classmethod
    def parse(cls, text: bytes, *, where: str) -> Manifest:
        """The manifest in a file's content. Raises DataError."""
        try:
            content = json.loads(text)
            if content.get("format") != FORMAT:
                raise StorageError(f"{where}: format {content.get('format')!r}; this mmit reads {FORMAT}")
            content["shards"] = tuple(ShardInfo(**shard) for shard in content["shards"])
            content["bad"] = tuple(content["bad"])
            for shard in content["shards"]:
                if Path(shard.file).name != shard.file or not shard.file.endswith(".tar"):
                    raise StorageError(f"{where}: names a shard '{shard.file}', which is no name of a tar beside it")
            return cls(**content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StorageError(f"{where}: cannot be read ({error}); convert the data set again") from None


class ShardWriter:
    """Writes one shard; nothing stands under its name before ``finish``.

    with ShardWriter(path) as shard:
        shard.write("00000017", conversation)
        info = shard.finish()
    """

    def __init__(self, path: Path) -> None:
        from webdataset.writer import TarWriter  # here, since it imports torch

        self.path = path
        self.samples = 0
        self.images = 0
        self.payload = 0  # bytes of all members, headers aside
        self._partial = path.with_name(path.name + ".partial")
        try:
            self._file = _Hashed(self._partial.open("wb"))
        except OSError as error:
            raise cannot_write(path, error) from None
        self._tar = TarWriter(cast("BinaryIO", self._file), encoder=False, mtime=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # the buffer of an abandoned shard may not fit on the disk either
            self._file.raw.close()
        self._partial.unlink(missing_ok=True)

    def write(self, key: str, conversation: Conversation) -> None:
        """Append a sample. Raises DataError where the disk is full."""
        assert KEY.fullmatch(key), f"{key!r} is no key of the form {KEY.pattern}"
        assert len(conversation.images) == len(conversation.sizes), f"{key}: images and sizes differ"
        members: dict[str, Any] = {"__key__": key, "json": stored.to_json(conversation)}
        for number, image in enumerate(conversation.images):
            members[f"{number}.{image_type(image)}"] = image
        try:
            self.payload += self._tar.write(members)
        except OSError as error:
            raise cannot_write(self.path, error) from None
        self.samples += 1
        self.images += len(conversation.images)

    def finish(self) -> ShardInfo:
        """Close the tar, give it its name, index it. Raises DataError where the disk is full."""
        try:
            self._tar.close()
            self._file.raw.flush()
            os.fsync(self._file.raw.fileno())
            self._file.raw.close()
            os.replace(self._partial, self.path)
        except OSError as error:
            raise cannot_write(self.path, error) from None
        rows, _ = load_index(self.path, cache=self.path.parent)
        assert len(rows) == self.samples, f"{self.path}: wrote {self.samples} samples and indexed {len(rows)}"
        return ShardInfo(
            file=self.path.name,
            bytes=self._file.count,
            sha256=self._file.hash.hexdigest(),
            index=digest(rows),
            samples=self.samples,
            images=self.images,
        )


def image_type(image: bytes) -> str:
    """The file ending that fits the content, whatever the file was called."""
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    return next((kind for magic, kind in _MAGIC if image.startswith(magic)), "ppm")


class _Hashed:
    """A file to write to, that counts and hashes what passes."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw = raw
        self.count = 0
        self.hash = hashlib.sha256()

    def write(self, content: bytes) -> int:
        if self.raw.closed:  # an abandoned shard: tarfile still writes its last buffer when it is collected
            return len(content)
        self.hash.update(content)
        self.count += len(content)
        return self.raw.write(content)
