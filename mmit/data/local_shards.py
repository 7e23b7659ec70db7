"""The tars of a data set on this machine: found, and held against the manifest, without being read."""

from __future__ import annotations

import glob
from pathlib import Path

from mmit.data.faults import StorageError
from mmit.data.remote import is_remote
from mmit.data.shards import MANIFEST, Manifest
from mmit.errors import DataError


def check_present(path: str | Path) -> None:
    """Raise DataError where ``open_source`` would find no complete set; nothing is read but a manifest.

    What lies behind a URL is not asked.
    """
    if is_remote(path):
        return
    _, tars, manifest = local_set(path)
    for number, tar in enumerate(tars):
        check_size(tar, manifest.shards[number].bytes if manifest else None)


def local_set(path: str | Path) -> tuple[Path, list[Path], Manifest | None]:
    """Where a set lies on this machine, its tars, and what its manifest says. Raises DataError where there is none."""
    location = Path(str(path).removeprefix("file://")).expanduser()
    if location.is_file() and location.suffix != ".tar":
        raise DataError(f"{path}: is no set of shards; make one with `mmit data convert {path} --out DIR`")
    directory = location if location.is_dir() else location.parent
    manifest = Manifest.read(location) if (location / MANIFEST).is_file() else None
    if manifest is not None:
        tars = [location / shard.file for shard in manifest.shards]
    elif location.is_dir():
        tars = sorted(location.glob("*.tar"))
    else:
        tars = sorted(Path(name) for name in glob.glob(str(location)))
    if not tars:
        unfinished = location.with_name(location.name + ".partial")
        hint = (
            f"; {unfinished} is an unfinished conversion: run the same `mmit data convert` again"
            if unfinished.is_dir()
            else ""
        )
        if not hint and not glob.has_magic(str(location)) and not location.exists():
            raise DataError(f"{path}: there is no such directory or tar; shards are made by `mmit data convert`")
        raise DataError(f"{path}: no shards (*.tar) here{hint}")
    if directory.name.endswith(".partial"):
        raise DataError(f"{path}: an unfinished conversion; run the same `mmit data convert` again to finish it")
    return location, tars, manifest


def check_size(tar: Path, stated: int | None) -> None:
    """Raise StorageError where a tar is not there, or has not the bytes that the manifest states."""
    if not tar.is_file():
        raise StorageError(f"{tar}: the shard is missing")
    if stated is not None and tar.stat().st_size != stated:
        raise StorageError(
            f"{tar}: has {tar.stat().st_size} bytes where the manifest says {stated}: "
            "it was cut or replaced; copy it or convert the data set again"
        )
