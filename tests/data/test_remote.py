"""Shards behind a URL: the same samples, whatever the server does, within the bytes that the cache may have."""

import errno
import multiprocessing
import os
import pickle
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from data_factories import encode, make_shards, measure
from shard_server import ShardServer, serving

from mmit.data import order, remote, shard_cache
from mmit.data.faults import MissingShardError, StorageError
from mmit.data.lengths import measure_lengths
from mmit.data.loader import Loader, StepBatches
from mmit.data.plan import Plan, make_plan
from mmit.data.shard_set import ShardSet, open_source
from mmit.errors import ConfigError, DataError, MissingExtra

TAR = "shard-000001.tar"


@pytest.fixture
def local(tmp_path: Path) -> ShardSet:
    return make_shards(tmp_path, 12)


@pytest.fixture
def server(local: ShardSet, monkeypatch: pytest.MonkeyPatch) -> Iterator[ShardServer]:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)
    with serving(local.directory) as state:
        yield state


def opened(server: ShardServer, tmp_path: Path, **options: int) -> ShardSet:
    return open_source(server.url, cache=tmp_path / "here", **options)


def tars_in(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "here" / "shards").rglob("*.tar"))


def test_a_set_behind_a_url_is_the_set_on_the_disk(server: ShardServer, local: ShardSet, tmp_path: Path) -> None:
    far = opened(server, tmp_path)
    assert [path for path in server.asked if path.endswith(".tar")] == []  # manifest and indexes are enough to plan
    assert (len(far), far.name, far.fingerprint) == (len(local), local.name, local.fingerprint)
    assert [far.read(n) for n in range(12)] == [local.read(n) for n in range(12)]
    copy = pickle.loads(pickle.dumps(far))
    assert copy.read(11) == local.read(11)
    assert {name: count for name, count in server.asked.items() if name.endswith(".tar")} == {
        "shard-000000.tar": 1,
        "shard-000001.tar": 1,
        "shard-000002.tar": 1,
    }


def test_without_an_index_beside_it_the_shard_itself_is_indexed(
    server: ShardServer, local: ShardSet, tmp_path: Path
) -> None:
    for path in local.directory.glob("*.idx.npy"):
        path.unlink()
    assert opened(server, tmp_path).read(7) == local.read(7)
    again = opened(server, tmp_path)
    assert server.asked["shard-000000.idx.npy"] == 1  # the index that was made is kept
    assert len(again) == 12


def test_an_index_that_is_not_that_of_the_manifest_is_not_believed(
    server: ShardServer, local: ShardSet, tmp_path: Path
) -> None:
    right = local.read(7)
    shutil.copy(local.directory / "shard-000000.idx.npy", local.directory / "shard-000001.idx.npy")
    assert opened(server, tmp_path).read(7) == right


@pytest.mark.parametrize("kind", ["503", "404", "cut", "other"])
def test_what_fails_for_a_while_is_tried_again(kind: str, server: ShardServer, local: ShardSet, tmp_path: Path) -> None:
    server.trouble = lambda name, number: kind if name == TAR and number < 3 else "ok"
    assert opened(server, tmp_path).read(7) == local.read(7)
    assert server.asked[TAR] == 4


@pytest.mark.parametrize(("kind", "asked"), [("cut", 4), ("no-range", 2)])
def test_a_transfer_that_broke_off_goes_on_where_it_stopped(
    kind: str, asked: int, server: ShardServer, local: ShardSet, tmp_path: Path
) -> None:
    size = local.tars[1].stat().st_size
    server.trouble = lambda name, number: "ok" if name != TAR else ["cut", kind, kind, "ok"][number]
    assert opened(server, tmp_path).read(7) == local.read(7)
    assert server.asked[TAR] == asked
    assert server.ranges[0] == f"bytes={size // 2}-"


def test_a_server_that_hangs_is_given_up_and_asked_again(
    server: ShardServer, local: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "TIMEOUT", 0.2)
    server.trouble = lambda name, number: "slow" if name == TAR and number == 0 else "ok"
    assert opened(server, tmp_path).read(7) == local.read(7)
    assert server.asked[TAR] == 2


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("503", "HTTP 503 Service Unavailable"),
        ("404", "HTTP 404 Not Found"),
        ("other", r"its content is not what the manifest says \(SHA-256\)"),
    ],
)
def test_what_stays_away_is_named_and_leaves_nothing_behind(
    kind: str, reason: str, server: ShardServer, tmp_path: Path
) -> None:
    far = opened(server, tmp_path)
    server.trouble = lambda name, number: kind if name == TAR else "ok"
    with pytest.raises(MissingShardError, match=rf"{server.url}{TAR}: cannot be fetched \({reason}\), tried 6 times"):
        far.read(7)
    with pytest.raises(MissingShardError):
        far.read(6)
    assert server.asked[TAR] == remote.ATTEMPTS  # what is gone is not asked for again for each of its samples
    assert far.read(1).messages
    assert [path.name for path in (tmp_path / "here").rglob("*.partial")] == []


def test_a_shard_replaced_on_the_server_is_refused(server: ShardServer, local: ShardSet, tmp_path: Path) -> None:
    far = opened(server, tmp_path)
    shutil.copy(local.tars[0], local.tars[1])
    with pytest.raises(MissingShardError, match="not what the manifest says"):
        far.read(7)


def test_a_url_without_a_set_is_one_sentence(server: ShardServer, tmp_path: Path, local: ShardSet) -> None:
    (local.directory / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"there is no manifest\.json here"):
        opened(server, tmp_path)
    with pytest.raises(ConfigError, match="'nosuch' is no protocol that fsspec knows"):
        open_source("nosuch://bucket/set", cache=tmp_path / "here")


@pytest.mark.parametrize("file", ["../../etc/x.tar", "/etc/x.tar", "a/b.tar", "x.txt"])
def test_a_manifest_cannot_write_elsewhere(file: str, server: ShardServer, tmp_path: Path, local: ShardSet) -> None:
    path = local.directory / "manifest.json"
    path.write_text(path.read_text().replace("shard-000000.tar", file))
    with pytest.raises(StorageError, match="is no name of a tar beside it"):
        opened(server, tmp_path)


# ---------------------------------------------------------------------------------------- the cache


def test_the_cache_stays_within_its_bytes_and_keeps_what_was_used_last(
    server: ShardServer, local: ShardSet, tmp_path: Path
) -> None:
    sizes = [tar.stat().st_size for tar in local.tars]
    far = opened(server, tmp_path, cache_bytes=sizes[0] + sizes[1])
    far.read(0)
    far.read(5)
    assert [path.name for path in tars_in(tmp_path)] == ["shard-000000.tar", "shard-000001.tar"]
    os.utime(tars_in(tmp_path)[1], (1, 1))
    far.read(10)
    assert sum(path.stat().st_size for path in tars_in(tmp_path)) <= sizes[0] + sizes[1]
    assert [path.name for path in tars_in(tmp_path)] == ["shard-000000.tar", "shard-000002.tar"]
    anew = opened(server, tmp_path, cache_bytes=sizes[0] + sizes[1])
    assert anew.read(5) == local.read(5)  # it was thrown out and comes again
    assert server.asked["shard-000001.tar"] == 2


def test_a_shard_larger_than_the_cache_is_said_to_be(server: ShardServer, tmp_path: Path) -> None:
    far = opened(server, tmp_path, cache_bytes=1000)
    with pytest.raises(StorageError, match=r"has \d+ bytes and the cache holds 1000; raise data\.cache_gb"):
        far.read(0)


def test_a_copy_that_is_damaged_here_is_fetched_again(server: ShardServer, local: ShardSet, tmp_path: Path) -> None:
    opened(server, tmp_path).read(0)
    (copy,) = tars_in(tmp_path)
    copy.write_bytes(copy.read_bytes()[:700])
    assert opened(server, tmp_path).read(0) == local.read(0)
    assert server.asked["shard-000000.tar"] == 2


def test_a_full_disk_is_not_taken_for_a_broken_sample_or_a_lost_shard(
    server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: BinaryIO, chunk: bytes, partial: Path) -> None:
        raise remote._disk(partial, OSError(errno.ENOSPC, "No space left on device"))

    far = opened(server, tmp_path)
    monkeypatch.setattr(remote, "_write", full)
    with pytest.raises(StorageError, match="no space left") as caught:
        far.read(0)
    assert not isinstance(caught.value, MissingShardError)
    assert server.asked["shard-000000.tar"] == 1
    assert tars_in(tmp_path) == []


def _read_all(url: str, cache: Path) -> None:
    far = open_source(url, cache=cache)
    assert sum(len(far.read(number).messages) for number in range(len(far))) == 24


def test_several_processes_on_a_host_fetch_each_shard_once(server: ShardServer, tmp_path: Path) -> None:
    server.trouble = lambda name, number: "slow" if name == "shard-000000.tar" else "ok"
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=_read_all, args=(server.url, tmp_path / "here")) for _ in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert [other.exitcode for other in others] == [0, 0, 0]
    assert [server.asked[f"shard-00000{n}.tar"] for n in range(3)] == [1, 1, 1]


def test_room_for_transfers_in_progress_is_counted(tmp_path: Path) -> None:
    cache = shard_cache.ShardCache(tmp_path, 1000)
    folder = tmp_path / "set"
    folder.mkdir()
    for age, name in enumerate(("old", "new")):
        (folder / f"{name}.tar").write_bytes(bytes(400))
        os.utime(folder / f"{name}.tar", (100 + age, 100 + age))
    (folder / ".a.tar.partial").write_bytes(bytes(10))
    (folder / ".a.tar.lock").write_text("900")  # nobody holds it: what a killed process left behind
    with shard_cache.locked(folder / ".b.tar.lock", note="500"):
        cache._make_room()
    assert sorted(path.name for path in folder.iterdir()) == [".a.tar.lock", ".a.tar.partial", ".b.tar.lock", "new.tar"]


def test_training_reads_a_few_shards_at_a_time_and_fetches_each_once_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "WINDOW", 2)
    local = make_shards(tmp_path, 60, shard_samples=3)
    size = max(tar.stat().st_size for tar in local.tars)
    with serving(local.directory) as server:
        far = opened(server, tmp_path, cache_bytes=8 * size)
        near, windows = planned(local), planned(far)
        assert near.fingerprint != windows.fingerprint
        server.asked.clear()
        loader = Loader(
            windows, encode, rank=0, world=1, rows_per_micro_batch=1, workers=0, pad_id=0, image_size=(2, 2)
        )
        names = [name for step in loader for batch in step.batches for name in batch.sample_ids]
        assert sorted(names) == [f"tiny/{number:08d}" for number in range(60)]
        fetched = [count for name, count in server.asked.items() if name.endswith(".tar")]
    assert len(fetched) <= 20
    assert sum(fetched) <= 24  # 20 shards, and the few whose window lies across a shuffled stretch of steps
    assert sum(path.stat().st_size for path in tars_in(tmp_path)) <= 8 * size


@pytest.fixture
def ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ShardServer, Plan]]:
    """A plan of ten shards, read one after another with a cache of eight: four may be there or on the way."""
    monkeypatch.setattr(order, "WINDOW", 1)
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)
    local = make_shards(tmp_path, 30, shard_samples=3)
    table = measure_lengths(local, measure, fingerprint="f", max_skipped=0, processes=1, progress=False)
    size = max(tar.stat().st_size for tar in local.tars)
    with serving(local.directory) as server:
        far = opened(server, tmp_path, cache_bytes=8 * size)
        yield (
            server,
            make_plan([(far, 30)], [table], length=16, rows_per_step=1, packing=False, tiles_per_row=8, seed=0),
        )


def tars_asked(server: ShardServer) -> dict[str, int]:
    return {name: count for name, count in server.asked.items() if name.endswith(".tar")}


def reading(plan: Plan, **options: Any) -> Iterator[StepBatches]:
    return iter(Loader(plan, encode, rank=0, world=1, rows_per_micro_batch=1, pad_id=0, image_size=(2, 2), **options))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_next_shards_come_while_one_is_read_and_no_more_than_the_cache_may_have(
    ahead: tuple[ShardServer, Plan], workers: int
) -> None:
    server, plan = ahead
    steps = reading(plan, workers=workers)
    first = next(steps)
    deadline = time.monotonic() + 20
    while len(tars_asked(server)) < 4 and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.05)
    assert 4 <= len(tars_asked(server)) <= 5  # half of the cache, and the one that the first step read
    names = [name for step in [first, *steps] for batch in step.batches for name in batch.sample_ids]
    assert sorted(names) == [f"tiny/{number:08d}" for number in range(30)]
    assert set(tars_asked(server).values()) == {1}


def test_a_shard_that_does_not_come_ahead_of_time_is_for_the_reader_to_report(ahead: tuple[ShardServer, Plan]) -> None:
    server, plan = ahead
    server.trouble = lambda name, number: "404" if name == "shard-000004.tar" else "ok"
    with pytest.raises(DataError, match=r"shard-000004\.tar: cannot be fetched"):
        list(reading(plan, workers=0))
    assert server.asked["shard-000004.tar"] > remote.ATTEMPTS  # both have tried


def planned(shards: ShardSet) -> Plan:
    table = measure_lengths(shards, measure, fingerprint="f", max_skipped=0, processes=1, progress=False)
    return make_plan(
        [(shards, len(shards))], [table], length=16, rows_per_step=1, packing=False, tiles_per_row=8, seed=0
    )


# ---------------------------------------------------------------------------------------- other stores


def test_any_url_that_fsspec_knows_is_read(local: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(local.directory) + "/", "/bucket/set/", recursive=True)
    try:
        far = open_source("memory://bucket/set", cache=tmp_path / "here")
        assert [far.read(n) for n in range(12)] == [local.read(n) for n in range(12)]
        memory.rm("/bucket/set/shard-000001.tar")
        monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)
        again = open_source("memory://bucket/set", cache=tmp_path / "elsewhere")
        with pytest.raises(MissingShardError, match=TAR):
            again.read(7)
    finally:
        memory.rm("/bucket", recursive=True)


def test_a_store_whose_package_is_missing_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec import core

    def missing(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(core, "url_to_fs", missing)
    with pytest.raises(MissingExtra, match=r"needs the package 's3fs': pip install 'mmit\[remote\]'"):
        open_source("s3://bucket/set", cache=tmp_path)
    with pytest.raises(ConfigError, match=r"abfs://bucket/set/.*: Install s3fs"):
        open_source("abfs://bucket/set", cache=tmp_path)


def test_a_file_url_is_a_local_path(local: ShardSet) -> None:
    assert np.array_equal(open_source(f"file://{local.directory}").images, local.images)
