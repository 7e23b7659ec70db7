"""The folder of a stage, and the lock that keeps two runs from writing into it."""

from __future__ import annotations

import fcntl
import shutil
import time
from pathlib import Path
from typing import IO

from mmit.errors import ConfigError

PATIENCE_SECONDS = 6.0


def open_folder(folder: Path, *, fresh: bool) -> IO[str]:
    """Make the folder of a stage, and hold it: the lock is free again when the file is closed or this process ends."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / f".{folder.name}.lock").open("w")
        _hold(lock, folder)
        if fresh and folder.exists() and any(folder.iterdir()):  # a run that failed early leaves an empty one
            if not (folder / "config.yaml").is_file():
                raise ConfigError(
                    f"--fresh would remove {folder}, which no run of mmit has written; remove it yourself"
                )
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output {folder}: cannot be written: {error.strerror}") from None
    return lock


def _hold(lock: IO[str], folder: Path) -> None:
    """Lock the file; of a run that was killed a reading process may hold it for some seconds more."""
    last = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < last:
                time.sleep(0.2)
                continue
            raise ConfigError(
                f"{folder} is being trained by another process; wait for it or take another 'output'"
            ) from None
        return
