"""Conversion: complete or visibly unfinished, continued by the same command, with every bad record named."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from data_factories import llava_record, picture, write_source

from mmit.data import conversion_folder, shards
from mmit.data import convert as convert_module
from mmit.data.convert import Conversion, convert
from mmit.data.faults import StorageError
from mmit.data.shard_set import open_source
from mmit.errors import DataError


def conversion(folder: Path, content: list[dict], **more: Any) -> Conversion:
    source = write_source(folder / "source", content)
    return Conversion(reader="llava_json", source=source, target=folder / "shards", name="set", shard_samples=4, **more)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".tar", ".json")}


def run(made: Conversion, **more: Any) -> None:
    settings: dict[str, Any] = {"processes": 1, "progress": False, **more}
    convert(made, **settings)


def test_every_record_is_written_once_shuffled_once_and_the_same_each_time(tmp_path: Path) -> None:
    # repeated ids, as LLaVA's have them: keys come from the row, the id stays in meta
    records = [{**llava_record(n % 5, words=n + 1), "task": f"t{n}"} for n in range(10)]
    made = conversion(tmp_path, records)
    run(made)
    one = files(made.target)
    run(made, overwrite=True, processes=2)
    assert files(made.target) == one
    assert sorted(one) == ["manifest.json", *(f"shard-00000{n}.tar" for n in range(3))]
    found = [open_source(made.target).read(n) for n in range(10)]
    tasks = [c.meta["task"] for c in found]
    assert sorted(tasks) == [f"t{n}" for n in range(10)]
    assert tasks != sorted(tasks)
    assert [c.id for c in found] == [f"set/0000000{c.meta['task'][1:]}" for c in found]
    assert [c.meta["id"] for c in found] == [f"r{int(c.meta['task'][1:]) % 5}" for c in found]


def test_the_manifest_says_what_is_there(tmp_path: Path) -> None:
    made = conversion(tmp_path, [llava_record(0), llava_record(1, image=None)], licence="CC0", recipe_digest="d")
    run(made)
    manifest = json.loads((made.target / "manifest.json").read_text())
    # the answers are "red red red", the questions "What is it?"
    assert manifest["totals"] == {"samples": 2, "images": 1, "text_only": 1, "text_bytes": 44, "bad": 0, "skipped": 0}
    assert (manifest["licence"], manifest["recipe_digest"], manifest["name"]) == ("CC0", "d", "set")
    assert [shard["samples"] for shard in manifest["shards"]] == [2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shards", "source"]
    assert sorted(p.suffix for p in made.target.iterdir()) == [".json", ".jsonl", ".npy", ".tar"]


def test_a_shard_ends_when_it_is_large_enough(tmp_path: Path) -> None:
    made = conversion(tmp_path, [llava_record(n) for n in range(4)], shard_bytes=1)
    run(made)
    assert [p.name for p in sorted(made.target.glob("*.tar"))] == [
        "shard-000000-1.tar",
        "shard-000000-2.tar",
        "shard-000000-3.tar",
        "shard-000000.tar",
    ]
    assert len(open_source(made.target)) == 4


BAD = {
    "missing": llava_record(1, image="gone.jpg"),
    "out": llava_record(2, image="../../../etc/passwd"),
    "words": llava_record(3, image="words.jpg"),
    "no image": {**llava_record(4), "image": None},
    "no turns": {"id": "r5"},
}


def test_bad_records_are_left_out_and_listed_up_to_the_limit(tmp_path: Path) -> None:
    records = [llava_record(0), *BAD.values(), *(llava_record(n) for n in range(6, 10))]
    made = conversion(tmp_path, records, max_bad=0.5)
    (made.source.parent / "words.jpg").write_text("words")
    run(made)
    listed = [json.loads(line) for line in (made.target / "bad.jsonl").read_text().splitlines()]
    assert sorted((bad["id"], bad["key"]) for bad in listed) == [(f"r{n}", f"record {n}") for n in range(1, 6)]
    assert {bad["id"]: bad["reason"] for bad in listed}["r1"].startswith("image 'gone.jpg' is not below")
    assert sorted(c.meta["id"] for c in map(open_source(made.target).read, range(5))) == ["r0", "r6", "r7", "r8", "r9"]
    with pytest.raises(DataError, match=r"5 bad records of 10 are more than max_bad 0\.4 allows .*r\d"):
        run(replace(made, max_bad=0.4, target=tmp_path / "strict"))
    assert not (tmp_path / "strict").exists()
    with pytest.raises(DataError, match="an unfinished conversion"):
        open_source(tmp_path / "strict.partial")


def test_a_mended_record_is_taken_in_by_the_same_command(tmp_path: Path) -> None:
    made = conversion(tmp_path, [llava_record(n, image="late.jpg" if n == 3 else "a.jpg") for n in range(12)])
    with pytest.raises(DataError, match="1 bad records of 12"):
        run(made)
    (made.source.parent / "late.jpg").write_bytes(picture())
    run(made)
    assert len(open_source(made.target)) == 12


def test_a_picture_that_only_decoding_finds_broken(tmp_path: Path) -> None:
    made = conversion(tmp_path, [llava_record(0, image="cut.jpg")])
    (made.source.parent / "cut.jpg").write_bytes(picture(640, 480)[:-500])
    run(made)  # the header is whole
    with pytest.raises(DataError, match=r"1 bad records of 1 .* image 0 of the record: the image is damaged"):
        run(replace(made, verify="decode"), overwrite=True)
    assert len(open_source(made.target)) == 1  # the finished one stays until a new one is whole


def test_a_finished_target_and_a_foreign_folder_are_refused(tmp_path: Path) -> None:
    made = conversion(tmp_path, [llava_record(0)])
    run(made)
    with pytest.raises(DataError, match="is already converted; --overwrite"):
        run(made)
    with pytest.raises(DataError, match="holds something else"):
        run(replace(made, target=made.source.parent), overwrite=True)


def test_the_wrong_number_of_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds 1 records and 2 are expected"):
        run(conversion(tmp_path, [llava_record(0)], records=2))


def test_broken_json_stops_the_conversion_at_its_place(tmp_path: Path) -> None:
    made = conversion(tmp_path, [])
    made.source.write_text('[{"id": "a", "conversations" []}]')
    with pytest.raises(DataError, match=r"set\.json:1:30: the JSON is broken"):
        run(made)
    assert not made.target.exists()


def test_a_full_disk_is_one_sentence_and_the_same_command_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = conversion(tmp_path, [llava_record(n) for n in range(12)])
    real, written = shards._Hashed.write, [0]

    def full(self: shards._Hashed, content: bytes) -> int:
        written[0] += len(content)
        if written[0] > 45_000:
            raise OSError(28, "No space left on device")
        return real(self, content)

    with monkeypatch.context() as patch:
        patch.setattr(shards._Hashed, "write", full)
        with pytest.raises(DataError, match=r"shard-000002\.tar: no space left .* run the same command again"):
            run(made)
    assert not made.target.exists()
    partial = tmp_path / "shards.partial"
    first = (partial / "shard-000000.tar").stat()
    assert not (partial / "shard-000002.tar").exists()
    run(made)
    assert len(open_source(made.target)) == 12
    assert (made.target / "shard-000000.tar").stat().st_ino == first.st_ino  # kept, not written again


def test_an_unfinished_conversion_is_not_continued_with_other_settings(tmp_path: Path) -> None:
    made = conversion(tmp_path, [llava_record(n, image="gone.jpg" if n == 3 else "a.jpg") for n in range(12)])
    with pytest.raises(DataError, match="1 bad records"):
        run(made)
    with pytest.raises(DataError, match=r"an unfinished conversion with other settings \(seed changed\); --overwrite"):
        run(replace(made, seed=1))
    (made.source.parent / "gone.jpg").write_bytes(picture())
    run(replace(made, seed=1), overwrite=True)
    assert len(open_source(made.target)) == 12


def _convert_slowly(made: Conversion) -> None:
    real = convert_module.write_json

    def slow(path: Path, content: dict) -> None:
        real(path, content)
        time.sleep(0.3)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert_module, "write_json", slow)
        convert(made, processes=2, progress=False)


def test_a_killed_conversion_looks_unfinished_and_is_continued(tmp_path: Path) -> None:
    made = conversion(tmp_path, [llava_record(n) for n in range(40)])
    process = multiprocessing.get_context("fork").Process(target=_convert_slowly, args=(made,))
    process.start()
    jobs = tmp_path / "shards.partial" / "jobs"
    deadline = time.monotonic() + 30
    while len(list(jobs.glob("*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not made.target.exists()
    with pytest.raises(DataError, match="is an unfinished conversion: run the same"):
        open_source(made.target)
    kept = {path.stem: path.stat().st_ino for path in (tmp_path / "shards.partial").glob("*.tar")}
    time.sleep(0.1)  # its workers are killed with it, which frees the lock
    run(made)
    found = open_source(made.target)
    assert sorted(found.read(n).meta["id"] for n in range(40)) == sorted(f"r{n}" for n in range(40))
    same = [stem for stem, inode in kept.items() if (made.target / f"{stem}.tar").stat().st_ino == inode]
    assert len(same) >= 3


def test_two_conversions_into_one_place_do_not_mix(tmp_path: Path) -> None:
    made = conversion(tmp_path, [llava_record(0)])
    with (
        conversion_folder.exclusive(tmp_path / "shards.partial"),
        pytest.raises(DataError, match="another process is converting into it"),
    ):
        run(made)


def test_an_unreadable_picture_is_not_blamed_on_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = conversion(tmp_path, [llava_record(0)])
    import builtins

    real: Any = builtins.open

    def failing(path: object, *args: Any, **more: Any) -> object:
        if str(path).endswith("a.jpg"):
            raise OSError(5, "Input/output error")
        return real(path, *args, **more)

    monkeypatch.setattr(builtins, "open", failing)
    with pytest.raises(StorageError, match=r"a\.jpg: cannot be read: Input/output error"):
        run(made)
