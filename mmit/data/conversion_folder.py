"""The folder of a conversion while it is not finished, and how it becomes the finished one.

TARGET.partial/conversion.json   what is being converted; another conversion may not continue this one
TARGET.partial/jobs/000003.json  the outcome of a finished job
TARGET.partial/shard-000003.tar
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmit.data.atomic import cannot_write, write_whole
from mmit.data.locks import hold
from mmit.data.shards import MANIFEST
from mmit.errors import DataError


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse a target that is finished (unless ``overwrite``) or holds other things. Raises DataError."""
    if (target / MANIFEST).is_file():
        if not overwrite:
            raise DataError(f"{target}: is already converted; --overwrite converts it again")
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target}: exists and holds something else than shards of mmit; choose another target")


@contextmanager
def exclusive(partial: Path) -> Generator[None]:
    """Let nobody else write the same conversion; the lock ends with the process. Raises DataError."""
    path = partial.with_name(f".{partial.name}.lock")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        lock = hold(path)
    except OSError as error:
        raise cannot_write(path, error) from None
    if lock is None:
        raise DataError(f"{partial}: another process is converting into it; wait for it to end")
    with lock:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def start_or_continue(partial: Path, plan: dict[str, Any], *, overwrite: bool) -> None:
    """Make the folder, or keep it where an earlier run with the same ``plan`` left it. Raises DataError."""
    path = partial / "conversion.json"
    if partial.exists() and not overwrite:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        if found is not None and found != plan and any((partial / "jobs").iterdir()):
            changed = sorted(k for k in plan if found.get(k) != plan[k])
            raise DataError(
                f"{partial}: an unfinished conversion with other settings ({', '.join(changed)} changed); "
                "--overwrite starts it again"
            )
        if found == plan:
            return
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (partial / "jobs").mkdir(parents=True)
    except OSError as error:
        raise cannot_write(partial, error) from None
    write_json(path, plan)


def publish(partial: Path, target: Path) -> None:
    """Give the finished folder its name; an older one goes only after the new one is whole. Raises DataError."""
    old = target.with_name(target.name + ".old")
    try:
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)
        os.replace(partial, target)
        (target / "conversion.json").unlink()
        shutil.rmtree(target / "jobs")
        for abandoned in target.glob("*.partial"):
            abandoned.unlink()
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise cannot_write(target, error) from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all. Raises DataError."""
    write_bytes(path, json.dumps(content, indent=1).encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. Raises DataError."""
    try:
        write_whole(path, content)
    except OSError as error:
        raise cannot_write(path, error) from None
