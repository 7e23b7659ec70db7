"""A stage's plan for people, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from mmit.train.planner import FIXED, HOLES, Choice, StagePlan, Way
from mmit.train.zero_memory import ACTIVATIONS, BUFFERS, GRADIENTS, OPTIMIZER, WEIGHTS

COLUMNS = (WEIGHTS, GRADIENTS, OPTIMIZER, BUFFERS, ACTIVATIONS)

ASSUMED_SHARE = 0.4
"""Of the rate of matrix products that a step reaches, where nothing was measured."""

GIB = 2**30


WIDE = 114
"""Characters of a line that shows all columns."""


def plan_table(plan: StagePlan, *, width: int) -> Table:
    """A line for each way to train the stage: GiB of a rank by what they are for, and the tokens that fit.

    width: characters of a line; below WIDE only what the parts come to is shown, and said so.
    """
    row = plan.workload.row
    title = (
        f"stage {plan.name}: peak GiB of each of {plan.machine.ranks} ranks; rows of {row.tokens} tokens ({row.tiles} "
        f"tiles, {row.trained} trained), {plan.stage.batch.rows_per_micro_batch} at a time"
    )
    whole = width >= WIDE
    table = Table(title=title, caption=None if whole else f"{WIDE} characters in a line show what the peak is made of")
    table.add_column("way", no_wrap=True)
    shown = (*COLUMNS, "rest") if whole else ()
    for column in (*shown, "peak", "host", *(["tokens that fit"] if plan.machine.memory else [])):
        table.add_column(column, justify="right")
    for choice in plan.choices:
        parts = choice.memory.parts
        sizes = {**parts, "rest": choice.rest}
        cells = [_gib(sizes.get(column, 0)) for column in shown]
        cells += [_gib(choice.bytes), _gib(choice.memory.host)]
        if plan.machine.memory:
            cells.append(f"{choice.tokens:,}" if choice.tokens else "none")
        is_best = plan.machine.memory and choice is plan.best
        table.add_row(str(choice.way), *cells, style="bold" if is_best else None)
    return table


def plan_lines(plan: StagePlan) -> Iterator[str]:
    """What stands below the table."""
    trained, frozen = (
        ", ".join(f"{name} {_gib(size)}" for name, size in sizes.items() if size) or "none"
        for sizes in (plan.weights.trained, plan.weights.frozen)
    )
    yield f"weights, GiB: trained {trained}; frozen {frozen}"
    for told, peak in zip(("activations", "recomputing"), plan.activations, strict=True):
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in peak.by_part.items())
        yield f"{told}, GiB: {parts}"
    yield (
        f"rest: {_gib(FIXED)} GiB for context and libraries, and {HOLES:.0%} of the other parts that the allocator "
        "loses between tensors; both assumed"
    )
    yield from _time(plan)
    if plan.machine.memory:
        yield from _advice(plan)


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


def _advice(plan: StagePlan) -> Iterator[str]:
    best = plan.best
    if best is None:
        yield (
            f"nothing fits {_gib(plan.machine.memory)} GiB: take more ranks, adapters (lora) with lora.quantize: nf4, "
            "or freeze more"
        )
        return
    told = best.way.overrides(plan.name)
    length, rows = plan.workload.row.tokens, plan.stage.batch.rows_per_micro_batch
    if best.tokens < plan.tokens:
        if best.tokens < length:
            room = _gib(plan.machine.memory)
            yield f"no way fits a row of {length} tokens into {room} GiB; the longest has {best.tokens} tokens"
            told.append(f"stages.{plan.name}.batch.length={_round(best.tokens)}")
            rows = 1
        else:
            rows = best.tokens // length
        told.append(f"stages.{plan.name}.batch.rows_per_micro_batch={rows}")
    yield f"{best.way} fits with up to {best.tokens // length} rows of {length} tokens at a time: {' '.join(told)}"


def _round(tokens: int) -> int:
    """A length that steps of whole rows divide."""
    return 2 ** (max(1, tokens).bit_length() - 1)


def as_json(plan: StagePlan) -> dict[str, Any]:
    """The plan in bytes, tokens and seconds."""
    work, best = plan.workload, plan.best if plan.machine.memory else None
    seconds = work.flops / reached(plan) if plan.machine.rate else None
    return {
        "stage": plan.name,
        "ranks": plan.machine.ranks,
        "memory": plan.machine.memory or None,
        "row": vars(work.row),
        "rows_per_micro_batch": plan.stage.batch.rows_per_micro_batch,
        "weights": {"trained": dict(plan.weights.trained), "frozen": dict(plan.weights.frozen)},
        "activations": [dict(peak.by_part) for peak in plan.activations],
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
        "recommended": best and {"way": str(best.way), "overrides": best.way.overrides(plan.name)},
    }


def _way(choice: Choice) -> dict[str, Any]:
    way: Way = choice.way
    return {
        **vars(way),
        "parts": dict(choice.memory.parts) | {"rest": choice.rest},
        "peak": choice.bytes,
        "host": choice.memory.host,
        "tokens": choice.tokens or None,
    }


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size >= GIB / 10 or not size else f"{size / GIB:.3f}"


def _hours(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
