"""Read every byte of a set of shards and say what is wrong with it, as a table of faults."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from mmit.data import forms, index
from mmit.data.convert import decode_all
from mmit.data.faults import StorageError
from mmit.data.parallel import run, usable_cores, with_progress
from mmit.data.shard_set import CACHE, ShardSet
from mmit.data.shards import MANIFEST, Manifest, ShardInfo
from mmit.errors import DataError
from mmit.images import read_size

_DETAIL = re.compile(r"'[^']*'|\"[^\"]*\"|\d+")


@dataclass
class Report:
    """What was found: counts of what is there, and for each kind of fault how often and the first three places."""

    samples: int = 0
    images: int = 0
    text_only: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0 where nothing is wrong, else 1."""
        return 1 if self.faults else 0

    def add(self, place: str, reason: str) -> None:
        """Note a fault; reasons that differ in numbers and quoted names only are one kind."""
        kind = _DETAIL.sub("…", reason)
        self.faults[kind] += 1
        shown = self.places.setdefault(kind, [])
        if len(shown) < 3:
            shown.append(f"{place}: {reason}")

    def merge(self, other: Report) -> None:
        """Take in the findings of another part of the set."""
        self.samples += other.samples
        self.images += other.images
        self.text_only += other.text_only
        self.faults.update(other.faults)
        for kind, places in other.places.items():
            self.places[kind] = (self.places.get(kind, []) + places)[:3]

    def table(self) -> Table:
        """``fault | count | first three``, for rich to print."""
        table = Table("fault", "count", "first three", title=f"{self.samples} samples, {self.images} images")
        for kind, count in self.faults.most_common():
            table.add_row(kind, str(count), "\n".join(self.places[kind]))
        return table


def check(path: str | Path, *, decode: bool = False, processes: int | None = None, progress: bool = True) -> Report:
    """Check the shards in a directory: manifest, hashes, tar structure, JSON, turns, image counts and sizes.

    decode: decode every picture too. Raises DataError where there are no shards at all.
    """
    directory = Path(path).expanduser()
    report = Report()
    manifest = None
    if (directory / MANIFEST).is_file():
        try:
            manifest = Manifest.read(directory)
        except DataError as error:
            report.add(MANIFEST, str(error))
    stated = {shard.file: shard for shard in manifest.shards} if manifest else {}
    tars = sorted({directory / name for name in stated} | set(directory.glob("*.tar")))
    if not tars:
        raise DataError(f"{directory}: there are no shards (*.tar) in it")
    if manifest is not None:
        for tar in tars:
            if tar.name not in stated:
                report.add(tar.name, "is not in the manifest")

    def work(tar: Path) -> tuple[Report, list[str]]:
        return _check_shard(tar, stated.get(tar.name), decode=decode)

    results = run(work, tars, processes=processes or usable_cores())
    keys: Counter[str] = Counter()
    for found, found_keys in with_progress(
        results, title=f"checking {directory.name}", total=len(tars), count=lambda _: 1, shown=progress
    ):
        report.merge(found)
        keys.update(found_keys)
    for key in (key for key, count in keys.items() if count > 1):
        report.add(f"key {key}", f"comes in {keys[key]} shards")
    if manifest is not None and not report.faults:
        _check_totals(report, manifest)
    return report


def _check_shard(tar: Path, stated: ShardInfo | None, *, decode: bool) -> tuple[Report, list[str]]:
    report = Report()
    keys: list[str] = []
    if not tar.is_file():
        report.add(tar.name, "the shard is missing")
        return report, keys
    try:
        if stated is not None and _sha256(tar) != stated.sha256:
            report.add(tar.name, "its content is not what the manifest says (SHA-256)")
        index.scan(tar)
        shard = ShardSet(tar.stem, tar.parent, [tar], None, CACHE.expanduser() / "check")
    except StorageError as error:
        report.add(tar.name, str(error).removeprefix(f"{tar}: "))
        return report, keys
    for number in range(len(shard)):
        place = f"{tar.name}: {shard.place(number)[1]}"
        keys.append(shard.place(number)[1])
        report.samples += 1
        try:
            conversation = shard.read(number)
            forms.checked_turns(list(conversation.messages))
            if conversation.sizes != tuple(read_size(image) for image in conversation.images):
                report.add(place, "an image is not of the size that its JSON states")
            if decode:
                decode_all(conversation.images)
        except DataError as error:
            report.add(place, str(error))
        else:
            report.images += len(conversation.images)
            report.text_only += not conversation.images
    return report, keys


def _check_totals(report: Report, manifest: Manifest) -> None:
    found = {"samples": report.samples, "images": report.images, "text_only": report.text_only}
    for name, count in found.items():
        if manifest.totals.get(name) != count:
            report.add(MANIFEST, f"says {manifest.totals.get(name)} {name} and there are {count}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
