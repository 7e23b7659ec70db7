"""The plan is a pure function, exact for any number of ranks, and no row overflows."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmit.conversation import Conversation
from mmit.data.lengths import ROW, LengthTable
from mmit.data.plan import Plan, make_plan
from mmit.data.summary import summarize, summary_table
from mmit.errors import DataError


class Named:
    """A data set that is only counted."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.fingerprint = f"{name} {size}"
        self.blocks: Sequence[int] = ()
        self.size = size

    def __len__(self) -> int:
        return self.size

    def read(self, number: int) -> Conversation:
        raise AssertionError(number)

    def place(self, number: int) -> tuple[str, str]:
        return self.name, str(number)


def table(tokens: list[int], images: list[int] | None = None) -> LengthTable:
    rows: Any = np.zeros(len(tokens), dtype=ROW)
    rows["tokens"] = tokens
    rows["trained"] = np.array(tokens) // 2
    rows["tiles"] = images or 0
    return LengthTable(rows=rows)


def plan(tables: list[LengthTable], draws: list[int] | None = None, **more: Any) -> Plan:
    sources = [(Named(f"s{n}", len(t)), (draws or [len(t) for t in tables])[n]) for n, t in enumerate(tables)]
    settings: dict[str, Any] = {
        "length": 100,
        "rows_per_step": 4,
        "packing": True,
        "tiles_per_row": 9,
        "seed": 0,
        **more,
    }
    return make_plan(sources, tables, **settings)


def seen(made: Plan) -> Counter[tuple[int, int]]:
    return Counter(sample for step in range(made.steps) for row in made.step(step) for sample in row.samples)


TABLES = st.lists(st.lists(st.integers(0, 100), min_size=1, max_size=60).filter(any).map(table), min_size=1, max_size=3)


@settings(max_examples=40, deadline=None)
@given(
    tables=TABLES,
    epochs=st.integers(1, 3),
    rows=st.integers(1, 7),
    packing=st.booleans(),
    seed=st.integers(0, 3),
)
def test_every_sample_is_planned_exactly_as_often_as_drawn(
    tables: list[LengthTable], epochs: int, rows: int, packing: bool, seed: int
) -> None:
    made = plan(tables, epochs=epochs, rows_per_step=rows, packing=packing, seed=seed)
    wanted = {(s, n): epochs for s, t in enumerate(tables) for n in range(len(t)) if t.tokens[n]}
    assert seen(made) == wanted  # 0 tokens: left out
    for step in range(made.steps):
        found = made.step(step)
        assert len(found) == rows
        assert any(row.samples for row in found)
        for row in found:
            assert row.tokens == sum(int(tables[s].tokens[n]) for s, n in row.samples) <= 100
            assert packing or len(row.samples) <= 1
    assert [len(row.samples) > 0 for step in range(made.steps - 1) for row in made.step(step)] == [True] * (
        rows * (made.steps - 1)
    )


@settings(max_examples=20, deadline=None)
@given(tables=TABLES, seed=st.integers(0, 3))
def test_the_same_inputs_give_the_same_plan(tables: list[LengthTable], seed: int) -> None:
    one, two = (plan(tables, seed=seed, epochs=2) for _ in range(2))
    assert [one.step(s) for s in range(one.steps)] == [two.step(s) for s in range(two.steps)]
    assert one.fingerprint == two.fingerprint


def test_draws_repeat_and_thin_out_evenly() -> None:
    many, few = table([10] * 7), table([10] * 30)
    found = seen(plan([many, few], draws=[20, 10], epochs=3))
    assert sorted(found[0, n] for n in range(7)) == [8, 8, 8, 9, 9, 9, 9]  # 60 draws of 7
    assert [found[1, n] for n in range(30)] == [1] * 30  # 3 x 10 draws of 30


def test_fewer_samples_than_rows_leave_empty_rows() -> None:
    made = plan([table([60, 60])], rows_per_step=8)
    assert made.steps == 1
    assert [row.tokens for row in made.step(0)] == [60, 60, 0, 0, 0, 0, 0, 0]
    assert (made.rows, made.samples) == (2, 2)


def test_max_steps_cuts_the_same_plan_short() -> None:
    tables = [table([30, 70, 50] * 20)]
    whole, short = plan(tables), plan(tables, max_steps=3)
    assert short.steps == 3
    assert [short.step(s) for s in range(3)] == [whole.step(s) for s in range(3)]
    assert short.fingerprint == whole.fingerprint
    assert short.samples == sum(len(row.samples) for s in range(3) for row in short.step(s))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"seed": 1}, "seed"),
        ({"length": 101}, "length"),
        ({"rows_per_step": 5}, "rows_per_step"),
        ({"packing": False}, "packing"),
        ({"tiles_per_row": 8}, "images_per_row"),
        ({"epochs": 2}, "epochs"),
        ({"draws": [5]}, "data"),
        ({"tables": [table([31, 70, 50] * 20)]}, "lengths (tokenizer, template, image tokens, too_long)"),
    ],
)
def test_what_changes_the_plan_changes_its_fingerprint_and_is_named(change: dict, part: str) -> None:
    before = plan([table([30, 70, 50] * 20)])
    settings: dict[str, Any] = {"tables": [table([30, 70, 50] * 20)], **change}
    after = plan(**settings)
    assert before.fingerprint != after.fingerprint
    assert [name for name in before.parts if before.parts[name] != after.parts[name]] == [part]


def test_nothing_left_to_train_on_is_an_error() -> None:
    with pytest.raises(DataError, match="s0: no sample is left to train on"):
        plan([table([0, 0])])


def test_the_summary_adds_up_by_hand() -> None:
    # rows of 100: {60, 40}, {60, 40}, {60}, {60}; two rows a step
    made = plan([table([60] * 4), table([40] * 2, images=[1, 1])], rows_per_step=2)
    found = summarize(made, length=100, world=2)
    assert (found.steps, found.rows, round(found.fill, 3)) == (2, 4, 0.8)
    assert [(s.samples, s.tokens, s.trained_tokens, s.tiles) for s in found.sources] == [
        (4, 240, 120, 0),
        (2, 80, 40, 2),
    ]
    assert found.useful == 1.0  # the steps are {100, 100} and {60, 60}
    assert summary_table(found).row_count == 2


def test_the_useful_share_of_llava_like_lengths() -> None:
    # assumed like LLaVA's 665k: 94 % with 576 image tokens, the rest long text; the bars are 0.96, 0.98 and 0.99 of
    # the work on 8 ranks at 2k, 4k and 8k tokens a row
    generator = np.random.default_rng(0)
    count = 40_000
    with_image = generator.random(count) < 0.94
    lengths = np.where(
        with_image,
        616 + generator.lognormal(np.log(150), 0.8, count),
        generator.lognormal(np.log(1100), 0.8, count),
    )
    for length, rows, bar in ((2048, 128, 0.96), (4096, 64, 0.98), (8192, 32, 0.99)):
        made = plan(
            [table(np.minimum(lengths, length).astype(int).tolist())],
            length=length,
            rows_per_step=rows,
            tiles_per_row=64,
        )
        assert summarize(made, length=length, world=8).useful > bar


def test_a_hundred_thousand_samples_are_planned_in_a_process_that_stays_small() -> None:
    # the bars are ten times what an idle core needs; benchmarks/plan.py tells the figures at ten millions
    script = Path(__file__).parents[2] / "benchmarks" / "plan.py"
    done = subprocess.run([sys.executable, script, "--start-up", "100000"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["cpu"] < 3
    assert found["peak"] - found["before"] < 50  # MiB
    assert found["plan"] < 100_000 * 11 / 2**20  # six bytes for a draw, and the rows


def test_pure_and_paired_steps_hold_what_they_say() -> None:
    tables = [table([60, 30, 20] * 20, images=[1] * 60), table([50] * 40)]
    pure = plan(tables, batches="pure")
    for step in range(pure.steps):
        assert len({row.tiles > 0 for row in pure.step(step) if row.samples}) == 1
    paired = plan(tables, batches="paired")
    for step in range(paired.steps - 1):
        assert len({row.tiles > 0 for row in paired.step(step)}) == 2
    for made in (pure, paired):
        assert set(seen(made).values()) == {1}
        assert all(len({s for s, _ in row.samples}) <= 1 for k in range(made.steps) for row in made.step(k))
        assert made.samples == 100
        assert made.rows == sum(bool(row.samples) for k in range(made.steps) for row in made.step(k))
    assert len({pure.fingerprint, paired.fingerprint, plan(tables).fingerprint}) == 3


def test_only_chosen_samples_are_drawn_and_as_often_as_asked_for() -> None:
    some = np.array([1, 3, 5], dtype=np.uint32)
    made = plan([table([10] * 8)], draws=[4], epochs=3, chosen=[some])
    assert seen(made) == {(0, 1): 4, (0, 3): 4, (0, 5): 4}
    assert made.fingerprint != plan([table([10] * 8)], draws=[4], epochs=3).fingerprint


def test_data_sets_of_one_name_are_told_apart() -> None:
    made = plan([table([10] * 3), table([10] * 3), table([10] * 3)])
    for source, name in zip(made.sources, ("a", "b", "a"), strict=True):
        source.name = name
    assert made.names == ("a#1", "b", "a#2")


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_ranks_share_every_step_and_its_cost(world: int) -> None:
    made = plan([table([n % 97 + 1 for n in range(600)], images=[n % 3 for n in range(600)])], rows_per_step=8)
    for step in range(made.steps):
        parts = [made.step_of_rank(step, rank=rank, world=world) for rank in range(world)]
        together = sorted(row.samples for part in parts for row in part if row.samples)
        assert together == sorted(row.samples for row in made.step(step) if row.samples)
