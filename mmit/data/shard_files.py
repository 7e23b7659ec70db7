"""Bytes of shards: files opened when needed, errors tried again, remote shards fetched on the way."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from mmit.data.faults import MissingShardError
from mmit.data.shard_cache import RemoteShards
from mmit.data.shards import ShardInfo

OPEN_FILES = 64
OPEN_REMOTE_FILES = 8
"""An open file keeps its space on the disk after the cache has thrown it out."""
RETRIES = 3


class ShardFiles:
    """The files of a set of shards, for one process.

    tars: where they are, or will be. remote, shards: where they come from, with their sizes and checksums.
    """

    def __init__(self, tars: Sequence[Path], remote: RemoteShards | None, shards: Sequence[ShardInfo]) -> None:
        self._tars = tars
        self._remote = remote
        self._shards = shards
        self._open: OrderedDict[int, int] = OrderedDict()
        self._gone: dict[int, str] = {}

    def read(self, shard: int, count: int, offset: int) -> bytes:
        """Bytes of a shard. A failure is tried again, then it is final: raises MissingShardError."""
        if shard in self._gone:
            raise MissingShardError(self._gone[shard])
        reason = ""
        for attempt in range(RETRIES + 1):
            try:
                content = os.pread(self._file(shard), count, offset)
            except MissingShardError as error:
                self._gone[shard] = str(error)
                raise
            except OSError as error:
                reason = f"cannot be read ({error.strerror})"
            else:
                if len(content) == count:
                    return content
                reason = f"ends before byte {offset + count}: it was cut after it was indexed"
            self.close(shard)
            if self._remote is not None:
                self._remote.discard(self._shards[shard])
            if attempt < RETRIES:
                time.sleep(0.1 * 4**attempt)
        self._gone[shard] = f"{self._tars[shard]}: {reason}, tried {RETRIES + 1} times"
        raise MissingShardError(self._gone[shard])

    def close(self, shard: int) -> None:
        """Close one file, so that it is opened anew."""
        file = self._open.pop(shard, None)
        if file is not None:
            os.close(file)

    def _file(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        while len(self._open) >= (OPEN_REMOTE_FILES if self._remote else OPEN_FILES):
            os.close(self._open.popitem(last=False)[1])
        path = self._tars[shard] if self._remote is None else self._remote.fetch(self._shards[shard])
        self._open[shard] = os.open(path, os.O_RDONLY)
        return self._open[shard]

    def __del__(self) -> None:
        for file in getattr(self, "_open", {}).values():
            os.close(file)
