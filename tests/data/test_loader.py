"""Batches of a rank: exact for any world and workers, resumed without replay, with holes for broken samples."""

import multiprocessing
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_factories import bomb, encode, make_shards, measure, picture, talk
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from mmit.batch import IGNORE, Encoded
from mmit.conversation import Conversation, ImageRef, Message
from mmit.data import shard_files
from mmit.data.lengths import measure_lengths
from mmit.data.loader import Loader, StepBatches
from mmit.data.plan import Plan, make_plan
from mmit.data.shard_set import ShardSet, open_source
from mmit.data.shards import ShardWriter
from mmit.errors import DataError
from mmit.images import ImageSpec

LENGTH = 24


def planned(shards: ShardSet, *, epochs: int = 1, rows_per_step: int = 6) -> Plan:
    table = measure_lengths(shards, measure, fingerprint="f", max_skipped=0, processes=1, progress=False)
    return make_plan(
        [(shards, len(shards))],
        [table],
        length=LENGTH,
        rows_per_step=rows_per_step,
        packing=True,
        tiles_per_row=8,
        seed=0,
        epochs=epochs,
    )


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return planned(make_shards(tmp_path_factory.mktemp("shards"), 90), epochs=2)


def loader(plan: Plan, rank: int = 0, world: int = 1, **more: Any) -> Loader:
    made: dict[str, Any] = {"rows_per_micro_batch": 2, "workers": 0, "pad_id": 7, "image_size": (2, 2), **more}
    return Loader(plan, made.pop("encode", encode), rank=rank, world=world, **made)


def ids(step: StepBatches) -> Counter[str]:
    return Counter(name for batch in step.batches for name in batch.sample_ids)


def global_steps(plan: Plan, world: int, **more: Any) -> list[Counter[str]]:
    """The samples of each step over all ranks."""
    ranks = [list(loader(plan, rank, world, **more)) for rank in range(world)]
    assert len({len(steps) for steps in ranks}) == 1
    for steps in zip(*ranks, strict=True):
        assert len({step.step for step in steps}) == 1
        assert len({len(step.batches) for step in steps}) == 1  # or ZeRO would wait for ever
    return [sum((ids(step) for step in steps), Counter()) for steps in zip(*ranks, strict=True)]


def test_every_sample_is_seen_as_often_as_planned(plan: Plan) -> None:
    total = sum(global_steps(plan, 1), Counter())
    assert total == {f"tiny/{number:08d}": 2 for number in range(90)}


@settings(max_examples=8, deadline=None)
@given(world=st.integers(2, 9), rows=st.integers(1, 4))
def test_the_steps_are_the_same_for_any_number_of_ranks(plan: Plan, world: int, rows: int) -> None:
    assert global_steps(plan, world, rows_per_micro_batch=rows) == global_steps(plan, 1)


LEGS = st.lists(
    st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 3), st.integers(0, 9).map(lambda k: int(k == 0))),
    min_size=1,
    max_size=6,
)
"""Steps until the run is stopped, its ranks, its rows in a micro-batch, its workers (now and then one)."""


@settings(max_examples=25, deadline=None)
@given(legs=LEGS)
def test_stopping_anywhere_and_going_on_with_other_ranks_workers_and_accumulation_changes_nothing(
    plan: Plan, legs: list[tuple[int, int, int, int]]
) -> None:
    found: list[Counter[str]] = []
    while len(found) < plan.steps:
        steps, world, rows, workers = legs[len(found) % len(legs)]
        more = {"rows_per_micro_batch": rows, "workers": workers, "start_step": len(found)}
        ranks = [list(islice(loader(plan, rank, world, **more), steps)) for rank in range(world)]
        found += [sum((ids(step) for step in together), Counter()) for together in zip(*ranks, strict=True)]
    name = plan.sources[0].place
    for step, seen in enumerate(found):
        assert seen == Counter(f"tiny/{name(n)[1]}" for row in plan.step(step) for _, n in row.samples)
    assert sum(found, Counter()) == {f"tiny/{number:08d}": 2 for number in range(90)}


def test_workers_change_nothing(plan: Plan) -> None:
    alone, helped = list(loader(plan)), list(loader(plan, workers=2))
    assert len(alone) == len(helped) == plan.steps
    for one, two in zip(alone, helped, strict=True):
        for mine, theirs in zip(one.batches, two.batches, strict=True):
            assert torch.equal(mine.input_ids, theirs.input_ids)
            assert torch.equal(mine.labels, theirs.labels)
            assert mine.sample_ids == theirs.sample_ids


def test_a_row_is_its_samples_one_after_another(plan: Plan) -> None:
    first = next(iter(loader(plan, rows_per_micro_batch=6)))
    (batch,) = first.batches
    for row, planned_row in enumerate(plan.step(0)):
        expected = [n for _, n in planned_row.samples for n in [n] * int(plan.tables[0].tokens[n])]
        keys = [int(plan.sources[0].place(n)[1]) for n in expected]
        assert batch.input_ids[row, : len(keys)].tolist() == keys
        assert (batch.input_ids[row, len(keys) :] == 7).all()
    assert batch.trained_tokens == int((batch.labels != IGNORE).sum())


def test_fewer_samples_than_ranks_give_empty_batches_and_equal_steps(tmp_path: Path) -> None:
    made = planned(make_shards(tmp_path, 3), rows_per_step=2)
    steps = global_steps(made, 5)
    assert sum(steps, Counter()) == {f"tiny/{n:08d}": 1 for n in range(3)}
    idle = next(iter(loader(made, 4, 5)))
    assert [batch.trained_tokens for batch in idle.batches] == [0]
    assert idle.batches[0].input_ids.shape == (1, 1)


def test_starting_late_reads_nothing_of_what_is_past(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    real = ShardSet.read

    def counted(self: ShardSet, number: int) -> Conversation:
        reads.append(number)
        return real(self, number)

    monkeypatch.setattr(ShardSet, "read", counted)
    (last,) = loader(plan, start_step=plan.steps - 1)
    assert last.step == plan.steps - 1
    assert len(reads) == sum(ids(last).values())


def breaking(names: set[str]) -> Callable[[Conversation], Encoded]:
    def encode_or_break(conversation: Conversation) -> Encoded:
        if conversation.id in names:
            raise DataError("the image is damaged")
        return encode(conversation)

    return encode_or_break


def test_a_broken_sample_is_a_hole_and_nothing_shifts(plan: Plan) -> None:
    broken = {"tiny/00000004", "tiny/00000031"}
    whole = list(loader(plan))
    holed = list(loader(plan, encode=breaking(broken), max_skipped=0.1))
    for before, after in zip(whole, holed, strict=True):
        assert ids(after) == Counter({name: k for name, k in ids(before).items() if name not in broken})
        for one, two in zip(before.batches, after.batches, strict=True):
            assert two.sample_ids == tuple(name for name in one.sample_ids if name not in broken)
    listed = [bad for step in holed for _, bad in step.skipped]
    assert Counter((bad.id, bad.key, bad.reason) for bad in listed) == {
        (name, name[5:], "the image is damaged"): 2 for name in broken
    }
    assert all(bad.shard.startswith("shard-0000") for bad in listed)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_broken_samples_end_the_run(plan: Plan, workers: int) -> None:
    names = {f"tiny/{n:08d}" for n in range(10)}
    made = loader(plan, encode=breaking(names), max_skipped=0.05, workers=workers)  # 9 of 180 may be
    with pytest.raises(DataError, match=r"1\d of 180 samples were broken, max_skipped 0\.05 allows 9; the last: shard"):
        list(made)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_length_that_is_not_the_planned_one_ends_the_run(plan: Plan, workers: int) -> None:
    def longer(conversation: Conversation) -> Encoded:
        made = encode(conversation)
        if conversation.id == "tiny/00000004":
            made = replace(made, input_ids=made.input_ids.repeat(2), labels=made.labels.repeat(2))
        return made

    with pytest.raises(DataError, match=r"00000004 \(tiny/00000004\) is 16 tokens long and the plan says 8"):
        list(loader(plan, encode=longer, workers=workers))


def test_a_shard_that_vanishes_ends_the_run_by_name(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, 30)
    made = planned(shards)
    shards.tars[2].write_bytes(b"")
    with pytest.raises(DataError, match=r"shard-000002\.tar: ends before byte"):
        list(loader(made, workers=1))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_samples_of_a_shard_that_vanished_are_holes_where_asked(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_files.time, "sleep", lambda _: None)
    shards = make_shards(tmp_path, 30)
    made = planned(shards)
    gone = {f"tiny/{shards.place(number)[1]}" for number in range(10, 15)}
    shards.tars[2].unlink()
    shards._files.close(2)
    steps = list(loader(made, workers=workers, on_missing_shard="skip", max_skipped=0.2))
    holes = [sample for step in steps for _, sample in step.skipped]
    assert [sample.shard for sample in holes] == ["shard-000002.tar"] * 5
    assert sorted(sample.id for sample in holes) == [f"sample {number}" for number in range(10, 15)]
    assert sum(map(ids, steps), Counter()) == Counter({f"tiny/{n:08d}" for n in range(30)} - gone)
    with pytest.raises(DataError, match=r"max_skipped 0\.1 allows 3; the last: shard-000002\.tar"):
        list(loader(made, workers=workers, on_missing_shard="skip", max_skipped=0.1))
    with pytest.raises(DataError, match=r"shard-000002\.tar: cannot be read \(No such file or directory\), tried 4"):
        list(loader(made, workers=workers, max_skipped=0.2))


def test_damaged_pictures_of_any_kind_are_holes(tmp_path: Path) -> None:
    pictures = [picture(), b"", bomb(), b"GIF89a", picture(64, 64)[:300]]
    with ShardWriter(tmp_path / "s.tar") as shard:
        for number, image in enumerate(pictures):
            sample = Conversation(id=f"s/{number}", messages=talk("a", "b", images=1), images=(image,), sizes=((8, 6),))
            shard.write(f"k{number}", sample)
        shard.finish()
    spec = ImageSpec(size=(2, 2), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize="squash", tokens_per_tile=1)

    def decoding(conversation: Conversation) -> Encoded:
        pixels = torch.cat([spec.prepare(image) for image in conversation.images])
        return replace(encode(structs.replace(conversation, images=())), pixels=pixels)

    (step,) = loader(planned(open_source(tmp_path)), encode=decoding, max_skipped=1)
    assert sorted(step.batches[0].sample_ids) == ["s/0"]
    reasons = {sample.key: sample.reason for _, sample in step.skipped}
    assert sorted(reasons) == ["k1", "k2", "k3", "k4"]
    assert "zero bytes" in reasons["k1"]
    assert "pixels" in reasons["k2"]


def test_turns_that_the_plan_leaves_out_are_left_out_of_the_batch(tmp_path: Path) -> None:
    messages = (
        *talk("a", "b"),
        Message(role="user", content=(ImageRef(0), "c")),
        Message(role="assistant", content=("d",)),
    )
    with ShardWriter(tmp_path / "s.tar") as shard:
        shard.write("5", Conversation(id="s/5", messages=messages, images=(picture(),), sizes=((8, 6),)))
        shard.finish()
    made = planned(open_source(tmp_path))
    rows = made.tables[0].rows.copy()
    rows[0] = (2, 1, 0, 2)
    cut = replace(made, tables=(replace(made.tables[0], rows=rows),), tokens=np.array([2, 0, 0, 0, 0, 0]))
    (step,) = loader(cut)
    assert step.batches[0].input_ids.tolist()[0][:2] == [5, 5]
    assert step.batches[0].pixels.shape == (0, 3, 2, 2)


def test_workers_survive_ctrl_c_and_a_schedulers_sigterm(plan: Plan) -> None:
    import signal

    before = set(multiprocessing.active_children())
    steps = iter(loader(plan, workers=2))
    seen = [ids(next(steps))]
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for worker in workers:
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    seen += [ids(step) for step in steps]
    assert sum(seen, Counter()) == {f"tiny/{number:08d}": 2 for number in range(90)}


def test_a_run_that_fails_ends_although_its_workers_wait(tmp_path: Path) -> None:
    make_shards(tmp_path, 30)
    script = tmp_path / "run.py"
    script.write_text(
        "from pathlib import Path\n"
        "from test_loader import loader, open_source, planned\n"
        f"steps = iter(loader(planned(open_source({str(tmp_path / 'tiny')!r})), workers=2))\n"
        "next(steps)\n"
        "raise SystemExit(3)\n"
    )
    folders = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    done = subprocess.run([sys.executable, script], env={**os.environ, "PYTHONPATH": folders}, timeout=60, check=False)
    assert done.returncode == 3
