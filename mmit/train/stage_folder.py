"""The folder of a stage, and the lock that keeps two runs from writing into it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import IO

from mmit.data.locks import hold
from mmit.errors import ConfigError


def open_folder(folder: Path, *, fresh: bool) -> IO[str]:
    """Make the folder of a stage, and hold it: the lock is free again when the file is closed or this process ends."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = hold(folder.parent / f".{folder.name}.lock")
        if lock is None:
            raise ConfigError(f"{folder} is being trained by another process; wait for it or take another 'output'")
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
