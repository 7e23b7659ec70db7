"""The folders of a run and of a stage: the lock that keeps two runs apart, and the complete checkpoints."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mmit.data.locks import hold
from mmit.errors import ConfigError

MARKER = "COMPLETE"
"""Written last into a checkpoint; a folder without it is none."""
BEGUN = "config.yaml"
"""Written into the folder of a stage when its parts, its data and its engine stand."""


@dataclass(frozen=True, kw_only=True)
class HeldFolder:
    """The folder of a stage, held by this process. made: the folders that were not there before, from within."""

    folder: Path
    lock: IO[str]
    made: Sequence[Path]
    was_empty: bool

    def close(self) -> None:
        """Let go, and remove what was made where the stage was refused before it began."""
        with self.lock, suppress(OSError):
            Path(self.lock.name).unlink(missing_ok=True)
            if self.was_empty and not (self.folder / BEGUN).is_file():
                shutil.rmtree(self.folder)
                for path in self.made[1:]:
                    path.rmdir()


def open_folder(folder: Path, *, fresh: bool) -> HeldFolder:
    """Make the folder of a stage, and hold it: it is free again when it is closed or this process ends."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = hold(folder.parent / f".{folder.name}.lock")
        if lock is None:
            raise ConfigError(f"{folder} is being trained by another process; wait for it or take another 'output'")
        was_empty = not folder.exists() or not any(folder.iterdir())
        held = HeldFolder(folder=folder, lock=lock, made=made, was_empty=was_empty)
        try:
            _prepare(held, fresh=fresh)
        except BaseException:
            held.close()
            raise
    except OSError as error:
        raise _unwritable(folder, error) from None
    return held


def _prepare(held: HeldFolder, *, fresh: bool) -> None:
    if fresh and not held.was_empty:
        if not (held.folder / BEGUN).is_file():
            raise ConfigError(
                f"--fresh would remove {held.folder}, which no run of mmit has written; remove it yourself"
            )
        shutil.rmtree(held.folder)
    held.folder.mkdir(parents=True, exist_ok=True)


def check_output(folder: Path) -> None:
    """Raise ConfigError where ``folder``, or what is missing on the way to it, could not be made and written into."""
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists() or one.is_symlink())
    try:
        with tempfile.TemporaryDirectory(prefix=".mmit-", dir=there):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from None


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"output {folder}: cannot be written: {error.strerror}; name another folder as 'output'")


def newest(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step below ``folder``, or None."""
    return max(complete(folder), key=step_of, default=None)


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints below ``folder``, the oldest first."""
    return sorted((path.parent for path in folder.glob(f"step-*/{MARKER}")), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that the name of a checkpoint tells, -1 where it tells none."""
    number = checkpoint.name.removeprefix("step-")
    return int(number) if number.isdecimal() else -1
