"""Write a file whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from mmit.errors import DataError


def write_whole(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path`` by a rename, so that nobody ever sees half of it. Raises OSError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def cannot_write(path: Path, error: OSError) -> DataError:
    """The error to raise where writing ``path`` failed."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DataError(f"{path}: no space left to write it; free some and run the same command again")
    return DataError(f"{path}: cannot be written: {error.strerror}")
