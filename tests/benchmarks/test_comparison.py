"""The harness of `make bench`: what its tables say, and that every system is given the same work."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from chart import Bars, bar_chart
from contest import Run
from observe import Span
from peer_task import Collator, Task
from peer_trainer import grouped
from report import Result, read, replace_section, summary, write
from schedule import Cell, Speed, choose_steps, round_seconds
from systems import UnequalWork, check_same_work
from world import Size, World, make_data, make_parts, run_file

from mmit.config import RunConfig
from mmit.models import build_model, save_model
from mmit.train.feed import make_encode, plan_stage

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
TOY = Size(
    pixels=28,
    vision_width=32,
    vision_layers=2,
    vision_heads=2,
    width=32,
    inner=64,
    layers=2,
    heads=2,
    rows=8064,
)


def run(*, tokens: int = 100, trained: int = 10) -> Run:
    span = Span(cpu_seconds=2.0, seconds=4.0, peak_bytes=2**30)
    return Run(span=span, samples=16, tokens=tokens, trained_tokens=trained, loss=1.0)


def figures(cpu: float, *, peak: float = 1000.0) -> dict[str, float]:
    return run().figures() | {"cpu_seconds_per_sample": cpu, "peak_mib": peak}


@pytest.fixture
def result() -> Result:
    facts = {"size": "tiny", "stage": 2, "ranks": 1, "steps": 2, "samples": 32}
    first = {"mmit": figures(1.0), "trainer": figures(2.0, peak=1500), "grouped": figures(1.5, peak=1200)}
    # the second round was stopped before the grouped Trainer
    return Result(facts=facts, rounds=[first, {"mmit": figures(1.0), "trainer": figures(3.0, peak=1500)}])


def test_figures_are_those_of_the_timed_steps() -> None:
    found = run().figures()
    assert found["samples_per_second"] == 16 / 4
    assert found["tokens_per_second"] == 100 / 4
    assert found["cpu_seconds_per_sample"] == 2 / 16
    assert found["peak_mib"] == 1024


def test_ratios_are_taken_within_a_round_and_to_the_best_of_the_others(result: Result) -> None:
    assert result.ratios("mmit", "trainer", "cpu_seconds_per_sample") == [2.0, 3.0]
    assert result.ratios("mmit", "grouped", "cpu_seconds_per_sample") == [1.5]
    assert result.best_peer("cpu_seconds_per_sample") == "grouped"
    head, _, row = (line.split(" | ") for line in summary([result]).splitlines())
    cells = dict(zip(head, row, strict=True))
    assert row[0] == "| tiny, stage 2, 1 rank"
    assert cells["mmit"] == "2.50 (2.00-3.00)"
    assert cells["Trainer, padded"] == "1.00 (1.00-1.00)"
    assert cells["Trainer, grouped by length"] == "1.33"
    assert cells["mmit, aim"] == "2.0"
    assert cells["mmit over the best other"] == "1.50 (Trainer, grouped by length)"
    assert row[-1] == "1.20 |"  # 1200 MiB of the least of the others over 1000


def test_what_was_written_is_read_again_and_put_into_a_page(result: Result, tmp_path: Path) -> None:
    write([result], tmp_path, command="make bench", on={"cpu": "any"})
    assert read(tmp_path) == ([result], "make bench", {"cpu": "any"})
    assert summary([result]) in (tmp_path / "training.md").read_text()
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- x -->\nold\n<!-- end of x -->\nafter\n")
    assert replace_section(page, "x", "new\n")
    assert page.read_text() == "before\n<!-- x -->\nnew\n<!-- end of x -->\nafter\n"
    assert not replace_section(page, "y", "new\n")


def test_bars_are_as_long_as_their_values() -> None:
    groups = [Bars(title="a <b>", values={"mmit": 2.0, "other": 1.0})]
    tree = ElementTree.fromstring(bar_chart(groups, order=("mmit", "other"), title="t", mark=1.0))
    bars = [float(box.get("width", 0)) for box in tree.findall(".//{*}rect") if box.get("height") == "12"]
    longest, shorter = sorted(bars)[-2:][::-1]
    assert longest == pytest.approx(2 * shorter, abs=0.1)
    assert "a <b>" in [text.text for text in tree.findall(".//{*}text")]


def test_the_benchmark_stops_where_systems_did_other_work() -> None:
    check_same_work({"mmit": run(), "trl": run()})
    with pytest.raises(UnequalWork, match=r"mmit: 100 and 10; TRL SFTTrainer: 100 and 11"):
        check_same_work({"mmit": run(), "trl": run(trained=11)})


def test_steps_are_chosen_so_that_a_round_fits_and_the_longest_runs_give_way_first() -> None:
    cells = [Cell(size, stage, 1) for size in ("tiny", "small") for stage in (1, 2)]
    speed = Speed(flops=80e9, start=6.0)
    systems = ["mmit", "trainer"]
    plenty = choose_steps(speed, cells, systems, warmup=1, seconds=1e6)
    assert set(plenty.values()) == {6}
    chosen = choose_steps(speed, cells, systems, warmup=1, seconds=600)
    assert round_seconds(speed, cells, systems, chosen, warmup=1) <= 600
    assert chosen["tiny", 2] >= chosen["small", 1] >= chosen["small", 2] >= 2
    assert set(choose_steps(speed, cells, systems, warmup=1, seconds=0).values()) == {2}


def test_grouping_puts_samples_of_like_length_side_by_side() -> None:
    records = [{"id": str(k), "tokens": (7 * k) % 31} for k in range(31)]
    lengths = [record["tokens"] for record in grouped(records, batch=4)]
    assert lengths == sorted(lengths, reverse=True)
    assert len(lengths) == 31


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Task, dict[str, tuple[int, int]]]]:
    """For each stage the task of a peer, and tokens and trained tokens of every record as mmit counts them."""
    world = World(tmp_path_factory.mktemp("world"), TOY)
    make_parts(world)
    found = {}
    for stage in (1, 2):
        make_data(world, stage, steps=1)
        config = RunConfig.model_validate(run_file(world, stage, length=2048, seed=0))
        loaded = build_model(config.model, dtype=torch.float32, seed=0)
        save_model(loaded, None, world.whole(stage), made_from={})
        measured = config.stages["measured"]
        plan = plan_stage(config, measured, make_encode(measured.data, loaded))
        (table,), (shards,) = plan.tables, plan.sources
        # shards hold the records in an order of their own
        places = [int(shards.read(number).id.rpartition("/")[2]) for number in range(len(shards))]
        records = json.loads(world.records(stage).read_text())
        task = Task(
            stage=stage,
            model=str(world.whole(stage)),
            images=str(world.images),
            records=records,
            timed=len(records),
            samples_per_micro_batch=8,
            micro_batches=2,
            learning_rate=1e-4,
            progress=str(world.folder / "progress"),
            counts=str(world.folder / "counts"),
            grouped=False,
        )
        pairs = zip(table.tokens.tolist(), table.trained.tolist(), strict=True)
        found[stage] = task, {f"{place:06d}": pair for place, pair in zip(places, pairs, strict=True)}
    return found


@pytest.mark.parametrize("stage", [1, 2])
def test_padded_batches_hold_the_tokens_that_mmit_trains(
    stage: int, tasks: dict[int, tuple[Task, dict[str, tuple[int, int]]]]
) -> None:
    task, expected = tasks[stage]
    collate = Collator(task)
    batch = collate(task.records)
    assert collate.counts == expected
    assert int((batch["labels"] != -100).sum()) == sum(trained for _, trained in expected.values())


@pytest.mark.long
def test_the_deepspeed_loop_tells_its_steps_and_counts(
    tasks: dict[int, tuple[Task, dict[str, tuple[int, int]]]], tmp_path: Path
) -> None:
    task, expected = tasks[2]
    file = tmp_path / "task.json"
    task.save(file)
    script = SCRIPTS / "peer_deepspeed.py"
    subprocess.run([sys.executable, "-W", "ignore", script, file], check=True, capture_output=True)
    assert Path(task.progress).read_text().count("\n") == 1  # 16 samples are two micro-batches, one step
    counted = json.loads(Path(f"{task.counts}.0").read_text())
    assert {name: tuple(pair) for name, pair in counted["samples"].items()} == expected
    assert counted["losses"]["1"] == pytest.approx(torch.log(torch.tensor(8064.0)).item(), abs=0.2)  # random weights
