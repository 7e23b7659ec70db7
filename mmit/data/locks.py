"""A file that one process holds at a time; the kernel lets go of it when the process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

PATIENCE_SECONDS = 6.0
"""A process that was killed may have children that hold its files for some seconds more."""


def hold(path: Path) -> IO[str] | None:
    """Lock a file and return it; closing it lets go. None where another process holds it. Raises OSError."""
    last = time.monotonic() + PATIENCE_SECONDS
    while True:
        lock = path.open("w", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            if time.monotonic() > last:
                return None
            time.sleep(0.1)
            continue
        with suppress(FileNotFoundError):  # the one that held it may have removed it since it was opened here
            if os.fstat(lock.fileno()).st_ino == path.stat().st_ino:
                return lock
        lock.close()
