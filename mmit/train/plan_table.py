"""A stage's plan for people, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.table import Table

from mmit.train.plan_advice import advice
from mmit.train.planner import HOLES, Choice, StagePlan
from mmit.train.zero_memory import ACTIVATIONS, BUFFERS, GRADIENTS, OPTIMIZER, WEIGHTS

COLUMNS = {WEIGHTS: "weights", GRADIENTS: "grads", OPTIMIZER: "optim", BUFFERS: "buffers", ACTIVATIONS: "activ"}

ASSUMED_SHARE = 0.4
"""Of the rate of matrix products that a step reaches, where nothing was measured."""

GIB = 2**30

WIDE = 100
"""Characters of a line that shows all columns."""


def plan_table(plan: StagePlan, *, width: int) -> Table:
    """A line for each way to train the stage: GiB of a rank by what they are for, and the tokens that fit.

    width: characters of a line; below WIDE only what the parts come to is shown, and said so.
    """
    whole, has_memory = width >= WIDE, plan.machine.memory > 0
    table = Table(
        title=f"stage {plan.name}: peak GiB of each of {plan.machine.ranks} rank{'s'[: plan.machine.ranks > 1]}",
        caption=None if whole else f"lines of {WIDE} characters show what the peak is made of",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        padding=(0, 1, 0, 0),
    )
    shown = (*COLUMNS, "rest") if whole else ()
    has_host = any(choice.memory.host for choice in plan.choices)
    for column in ("ZeRO", "recompute", "offload"):
        table.add_column(column, no_wrap=True)
    headers = [COLUMNS.get(column, column) for column in shown]
    for column in (*headers, "peak", *["host"] * has_host, *["tokens"] * has_memory):
        table.add_column(column, justify="right", no_wrap=True)
    best = advice(plan).choice if has_memory else None
    for choice in plan.choices:
        way, sizes = choice.way, {**choice.memory.parts, "rest": choice.rest}
        every = {0: "", 1: "all"}.get(way.recompute, f"1 of {way.recompute}")
        star = "*" if choice is best else ""
        cells = [f"{way.zero_stage}{star}", every, "" if way.offload == "none" else way.offload]
        cells += [_gib(sizes.get(column, 0)) for column in shown]
        cells += [_gib(choice.bytes), *[_gib(choice.memory.host)] * has_host]
        cells += [f"{choice.tokens:,}"] * has_memory
        table.add_row(*cells, style="bold" if choice is best else None)
    return table


def plan_lines(plan: StagePlan) -> Iterator[str]:
    """What stands below the table."""
    row, batch = plan.workload.row, plan.stage.batch
    yield (
        f"row: {row.tokens:,} tokens ({row.tiles:,} tiles of {plan.tile_tokens}, {row.trained:,} trained), "
        f"{batch.rows_per_micro_batch} at a time on a rank, {batch.rows_per_step} in a step; {plan.precision}"
    )
    trained, frozen = (
        ", ".join(f"{name} {_exact(size)}" for name, size in sizes.items() if size) or "none"
        for sizes in (plan.weights.trained, plan.weights.frozen)
    )
    yield f"weights, GiB: trained {trained}; frozen {frozen}"
    for every, peak in plan.activations.items():
        parts = ", ".join(f"{name} {_exact(size)}" for name, size in peak.by_part.items())
        told = {0: "", 1: ", recomputing"}.get(every, f", recomputing 1 of {every} layers")
        yield f"activations, GiB{told}: {parts}"
    yield (
        f"rest, assumed: {_gib(plan.machine.fixed)} GiB for context and libraries, and {HOLES:.0%} of the other parts "
        "for what is lost between tensors"
    )
    yield from _time(plan)
    if plan.machine.memory:
        yield (
            f"tokens: as many at a time as fit {_gib(plan.machine.memory)} GiB; the run file has {plan.tokens:,}. "
            f"*: the first way that fits. zero.stage: auto takes ZeRO-{plan.auto.way.zero_stage}, with {_kept(plan)}"
        )


def _kept(plan: StagePlan) -> str:
    if plan.stage.activation_checkpointing != "auto":
        return "recomputation and offloading as in the run file"
    told = {0: "none", 1: "every layer"}.get(plan.auto.way.recompute, f"1 layer of {plan.auto.way.recompute}")
    return f"offloading as in the run file; activation_checkpointing: auto recomputes {told}"


def reached(plan: StagePlan) -> float:
    """Operations per second of all ranks together."""
    return plan.machine.rate * ASSUMED_SHARE * plan.machine.ranks


def _time(plan: StagePlan) -> Iterator[str]:
    work = plan.workload
    yield f"numbers of the data: {work.source}"
    if not work.steps:
        return
    epochs = f"{plan.stage.epochs} epoch{'s'[: plan.stage.epochs > 1]}"
    yield (
        f"an epoch: {work.samples:,} samples, {work.tokens:,} tokens, {work.steps:,} steps, "
        f"{work.flops / 1e15:,.3g} PFLOP (recomputing adds {work.again / work.flops:.0%}); the stage has {epochs}"
    )
    if plan.machine.rate:
        hours = [flops / reached(plan) / 3600 for flops in (work.flops, work.again)]
        yield (
            f"time of an epoch: {_hours(hours[0])}, recomputing {_hours(sum(hours))}, where a step reaches "
            f"{ASSUMED_SHARE:.0%} (assumed) of {plan.machine.rate / 1e12:.4g} TFLOP/s on each device"
        )
    else:
        yield "time of an epoch: give --rate, the TFLOP/s of a device's matrix products (about 790 for an H200 in bf16)"


def as_json(plan: StagePlan) -> dict[str, Any]:
    """The plan in bytes, tokens and seconds."""
    work, told = plan.workload, advice(plan) if plan.machine.memory else None
    seconds = work.flops / reached(plan) if plan.machine.rate else None
    return {
        "stage": plan.name,
        "ranks": plan.machine.ranks,
        "memory": plan.machine.memory or None,
        "row": vars(work.row),
        "rows_per_micro_batch": plan.stage.batch.rows_per_micro_batch,
        "weights": {"trained": dict(plan.weights.trained), "frozen": dict(plan.weights.frozen)},
        "precision": plan.precision,
        "activations": {every: dict(peak.by_part) for every, peak in plan.activations.items()},
        "ways": [_way(choice) for choice in plan.choices],
        "epoch": {
            "samples": work.samples,
            "steps": work.steps,
            "tokens": work.tokens,
            "flops": work.flops,
            "flops_of_recomputing": work.again,
            "seconds": seconds,
            "numbers_from": work.source,
        },
        "auto": plan.auto.way.zero_stage if plan.machine.memory else None,
        "recommended": told
        and {
            "way": None if told.choice is None else str(told.choice.way),
            "sentence": told.sentence,
            "overrides": list(told.overrides),
        },
    }


def _way(choice: Choice) -> dict[str, Any]:
    return {
        **vars(choice.way),
        "parts": dict(choice.memory.parts) | {"rest": choice.rest},
        "peak": choice.bytes,
        "host": choice.memory.host,
        "tokens": choice.tokens or None,
    }


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"


def _exact(size: float) -> str:
    return f"{size / GIB:.1f}" if size >= GIB / 10 or not size else f"{size / GIB:.2g}"


def _hours(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
