"""The count of what a stage leaves out: it goes on over resumptions, and ends the run above its limit."""

import json
from pathlib import Path

import pytest
from data_factories import make_shards, measure

from mmit.data import make_plan, open_source
from mmit.data.faults import BadSample
from mmit.data.lengths import fit, measure_lengths
from mmit.data.plan import Plan
from mmit.errors import DataError
from mmit.train.checkpoint import RunState
from mmit.train.skipped import SkippedRecord, left_out


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """34 draws from two data sets of the same name: one has two samples in quarantine, one four that are too long."""
    sets = [make_shards(tmp_path_factory.mktemp("set"), 20, lengths=[1] * 16 + [20] * 4) for _ in range(2)]
    entries = [sets[1].entry(number, "blurred") for number in (3, 9)]
    lines = [f"{e.shard}\t{e.row}\t{e.check:08x}\t{e.key}\t{e.reason}\n" for e in entries]
    (sets[1].directory / "quarantine.txt").write_text("".join(lines))
    sets[1] = open_source(sets[1].directory)
    tables = [measure_lengths(s, measure, fingerprint="f", max_skipped=0, processes=1, progress=False) for s in sets]
    tables[0], dropped = fit(tables[0], sets[0], measure, fingerprint="f", length=16, tiles_per_row=8, too_long="drop")
    assert dropped == 4
    return make_plan(
        [(found, 20) for found in sets],
        tables,
        length=32,
        rows_per_step=4,
        packing=True,
        tiles_per_row=8,
        seed=0,
    )


def state(step: int = 0, **skipped: int) -> RunState:
    return RunState(
        step=step, stage="s", plan="p", world=1, zero_stage=0, precision="float32", settings={}, skipped=skipped
    )


def bad(name: str) -> BadSample:
    return BadSample(id=name, key=name, shard="shard-000000.tar", reason="torn")


def test_what_the_plan_leaves_out_is_told_by_reason(plan: Plan) -> None:
    assert left_out(plan) == {"tiny#1": {"too_long": 4}, "tiny#2": {"quarantined": 2}}


def test_the_count_goes_on_where_the_checkpoint_was_and_the_list_forgets_what_is_done_again(
    plan: Plan, tmp_path: Path
) -> None:
    record = SkippedRecord(tmp_path, plan, state(), max_skipped=0.5)
    record.note([(0, bad("a"))], [1, 0], step=1)
    record.note([(1, bad("b")), (1, bad("c"))], [0, 3], step=2)  # one of the three is another rank's
    record.note([(0, bad("d"))], [1, 0], step=3)
    assert record.totals == {"tiny#1": 2, "tiny#2": 3}

    again = SkippedRecord(tmp_path, plan, state(2, **{"tiny#1": 1, "tiny#2": 3}), max_skipped=0.5)
    again.note([(0, bad("d"))], [1, 0], step=3)
    assert again.facts()["skipped"] == {"tiny#1": 2, "tiny#2": 3}
    lines = [json.loads(line) for line in (tmp_path / "skipped-rank0.jsonl").read_text().splitlines()]
    assert [(line["step"], line["source"], line["id"]) for line in lines] == [
        (1, "tiny#1", "a"),
        (2, "tiny#2", "b"),
        (2, "tiny#2", "c"),
        (3, "tiny#1", "d"),
    ]


def test_too_many_over_all_ranks_and_resumptions_end_the_run(plan: Plan, tmp_path: Path) -> None:
    record = SkippedRecord(tmp_path, plan, state(7, **{"tiny#1": 2}), max_skipped=0.06)  # 2.04 of 34
    with pytest.raises(
        DataError, match=r"^3 \(tiny#1 2, tiny#2 1\) of 34 samples were broken by step 8, max_skipped 0.06 allows 2"
    ):
        record.note([], [0, 1], step=8)
