"""Read every byte of a set of shards and say what is wrong with it: structure, samples, repetitions, leaks."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mmit.conversation import Conversation
from mmit.data import forms, index
from mmit.data.convert import decode_all
from mmit.data.examine import COMMON, Control, content_key, examine
from mmit.data.faults import StorageError
from mmit.data.findings import Report
from mmit.data.order import key
from mmit.data.parallel import run, usable_cores, with_progress
from mmit.data.remote import is_remote
from mmit.data.repeats import Contents, note_leaks, note_repeats
from mmit.data.shard_cache import RemoteShards
from mmit.data.shard_set import CACHE, CACHE_BYTES, ShardSet, one_shard, open_source
from mmit.data.shards import MANIFEST, Manifest, ShardInfo
from mmit.errors import DataError
from mmit.images import read_size


@dataclass(frozen=True, kw_only=True)
class Depth:
    """How closely shards are looked at. decode: every picture too, not only its header. control: see ``examine``."""

    decode: bool = True
    control: Control = COMMON
    processes: int = field(default_factory=usable_cores)
    progress: bool = True
    cache: Path = CACHE
    cache_bytes: int = CACHE_BYTES


@dataclass(frozen=True)
class _Target:
    """Tars to look at, with what a manifest says of each, and where they are fetched from."""

    name: str
    tars: list[Path]
    stated: dict[str, ShardInfo]
    manifest: Manifest | None
    remote: RemoteShards | None = None


def check(path: str | Path, depth: Depth, *, against: Sequence[str | Path] = ()) -> Report:
    """Check shards: manifest, hashes, tar structure, JSON, turns, pictures, control tokens, repetitions.

    path: a directory, a tar, a pattern of tars, or a URL. against: other sets, none of whose samples may be in this
    one. Raises DataError where there are no shards at all.
    """
    report = Report()
    target = _find(path, report, depth)
    report.name = target.name
    report.url = target.remote.url if target.remote else ""
    report.tars = {tar.name: tar for tar in target.tars}
    contents = _scan(target, report, depth)
    note_repeats(report, contents)
    if target.manifest is not None and not report.faults and not report.quarantined:
        _check_totals(report, target.manifest)
    for other in against:
        theirs = _find(other, Report(), depth)
        note_leaks(report, contents, theirs.name, _scan(theirs, Report(), depth))
    return report


def _find(path: str | Path, report: Report, depth: Depth) -> _Target:
    if is_remote(path):
        shards = open_source(path, cache=depth.cache, cache_bytes=depth.cache_bytes)
        assert shards.manifest is not None, "a remote set has one"
        stated = {shard.file: shard for shard in shards.manifest.shards}
        return _Target(shards.name, shards.tars, stated, shards.manifest, shards.remote)
    location = Path(str(path).removeprefix("file://")).expanduser()
    manifest = None
    if (location / MANIFEST).is_file():
        try:
            manifest = Manifest.read(location)
        except DataError as error:
            report.add(MANIFEST, str(error))
    stated = {shard.file: shard for shard in manifest.shards} if manifest else {}
    found = location.glob("*.tar") if location.is_dir() else map(Path, glob.glob(str(location)))
    tars = sorted({location / name for name in stated} | set(found))
    if not tars:
        raise DataError(f"{location}: there are no shards (*.tar) in it")
    if manifest is not None:
        for tar in tars:
            if tar.name not in stated:
                report.add(tar.name, "is not in the manifest")
    return _Target(manifest.name if manifest else location.name, tars, stated, manifest)


def _scan(target: _Target, report: Report, depth: Depth) -> list[Contents]:
    """Read all shards into the report; what lies in each, in the order of the shards."""

    def work(tar: Path) -> tuple[Report, Contents]:
        return _scan_shard(tar, target.stated.get(tar.name), target.remote, depth)

    results = run(work, target.tars, processes=depth.processes)
    parts = list(
        with_progress(
            results,
            title=f"checking {target.name}",
            total=len(target.tars),
            count=lambda _: 1,
            shown=depth.progress,
        )
    )
    parts.sort(key=lambda part: part[1].tar)
    for found, _ in parts:
        report.merge(found)
    return [contents for _, contents in parts]


def _scan_shard(
    tar: Path, stated: ShardInfo | None, remote: RemoteShards | None, depth: Depth
) -> tuple[Report, Contents]:
    report = Report()
    try:
        shard = _opened(tar, stated, remote, report, depth)
    except StorageError as error:
        report.add(tar.name, str(error).removeprefix(f"{tar}: "))
        return report, Contents(tar)
    left_out = set(shard.quarantined.tolist())
    report.quarantined = len(left_out)
    keys: list[np.uint64] = []
    contents: list[tuple[int, np.uint64]] = []
    pictures: list[tuple[int, np.uint64]] = []
    for row in range(len(shard)):
        report.samples += 1
        name = shard.place(row)[1]
        keys.append(key(name))
        if row in left_out:
            continue
        place, sample = f"{tar.name}: {name}", (tar.name, row)
        try:
            conversation = _read(shard, row, decode=depth.decode)
        except DataError as error:
            report.add(place, str(error), sample=sample)
            report.broken.append(shard.entry(row, str(error)))
            continue
        report.images += len(conversation.images)
        report.text_only += not conversation.images
        report.words[sum(len(message.text.split()) for message in conversation.messages).bit_length()] += 1
        for severity, reason in examine(conversation, depth.control):
            report.add(place, reason, severity, sample=sample)
            if severity == "error":
                report.broken.append(shard.entry(row, reason))
        whole, seen = content_key(conversation)
        contents.append((row, whole))
        pictures += [(row, picture) for picture in seen]
    return report, Contents.of(tar, keys, contents, pictures)


def _opened(tar: Path, stated: ShardInfo | None, remote: RemoteShards | None, report: Report, depth: Depth) -> ShardSet:
    if remote is not None and stated is not None:
        tar = remote.fetch(stated)
    if not tar.is_file():
        raise StorageError(f"{tar}: the shard is missing")
    if stated is not None and _sha256(tar) != stated.sha256:
        report.add(tar.name, "its content is not what the manifest says (SHA-256)")
    index.scan(tar)
    return one_shard(tar)


def _read(shard: ShardSet, row: int, *, decode: bool) -> Conversation:
    """The sample, if training could read it. Raises DataError."""
    conversation = shard.read(row)
    forms.checked_turns(list(conversation.messages))
    if conversation.sizes != tuple(read_size(image) for image in conversation.images):
        raise DataError("an image is not of the size that its JSON states")
    if decode:
        decode_all(conversation.images)
    return conversation


def _check_totals(report: Report, manifest: Manifest) -> None:
    found = {"samples": report.samples, "images": report.images, "text_only": report.text_only}
    for name, count in found.items():
        if manifest.totals.get(name) != count:
            report.add(MANIFEST, f"says {manifest.totals.get(name)} {name} and there are {count}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
