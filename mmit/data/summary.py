"""What a plan amounts to, in numbers and as a table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from mmit.data.plan import Plan
from mmit.data.steps import NO_ROW, deal


@dataclass(frozen=True, kw_only=True)
class SourceShare:
    """What one data set contributes over the whole plan; repetitions count.

    size: samples that it has. rows, steps: that hold a sample of it; sources share rows. left_out: samples of it that
    were refused or are too long.
    """

    name: str
    size: int
    samples: int
    tokens: int
    trained_tokens: int
    tiles: int
    rows: int
    steps: int
    left_out: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A plan in numbers.

    fill: share of the row places that hold tokens. text_rows: rows of text alone.
    useful: real tokens over ranks x what the slowest rank of each step computes, padding included.
    balance: cost (tokens and tiles) over ranks x the slowest of each micro-batch, where ranks wait for each other.
    """

    sources: tuple[SourceShare, ...]
    steps: int
    rows: int
    text_rows: int
    fill: float
    useful: float
    balance: float
    world: int


def summarize(plan: Plan, *, length: int, world: int = 1, rows_per_micro_batch: int = 1) -> Summary:
    """The numbers of a plan with rows of ``length`` tokens, as ``world`` ranks would run it."""
    row_places = plan.steps * plan.rows_per_step
    tokens = plan.tokens[:row_places].reshape(plan.steps, plan.rows_per_step)
    dealt = deal(plan.costs, world)  # (steps, rounds, world)
    costs = _computed(_of_rows(plan.costs, dealt), rows_per_micro_batch)
    computed = _computed(_of_rows(tokens, dealt), rows_per_micro_batch)
    real = int(tokens.sum())
    return Summary(
        sources=shares_of(plan),
        steps=plan.steps,
        rows=plan.rows,
        text_rows=int(np.count_nonzero((tokens.reshape(-1) > 0) & (plan.tiles[:row_places] == 0))),
        fill=real / (plan.rows * length),
        useful=real / (world * int(computed.sum(axis=1).max(axis=1).sum())),
        balance=float(costs.sum() / (world * costs.max(axis=2).sum())),
        world=world,
    )


def summary_table(summary: Summary) -> Table:
    """The numbers for rich to print: a line for each source."""
    total = sum(share.tokens for share in summary.sources)
    title = (
        f"{summary.steps} steps, {summary.rows:,} packs filled to {summary.fill:.1%}, {summary.text_rows:,} of them "
        f"text alone; useful work on {summary.world} ranks {summary.useful:.1%}, balance {summary.balance:.1%}"
    )
    table = Table("source", title=title)
    for column in ("size", "samples", "tokens", "share", "trained", "tiles", "packs", "steps", "left out"):
        table.add_column(column, justify="right")
    for share in summary.sources:
        counts = (share.trained_tokens, share.tiles, share.rows, share.steps, share.left_out)
        table.add_row(
            share.name,
            f"{share.size:,}",
            f"{share.samples:,}",
            f"{share.tokens:,}",
            f"{share.tokens / total:.1%}",
            *(f"{count:,}" for count in counts),
        )
    # as wide as its content, also where the output is a pipe, which rich takes for 80 columns
    wide = Console(width=1000)
    table.width = Measurement.get(wide, wide.options, table).maximum
    return table


def shares_of(plan: Plan) -> tuple[SourceShare, ...]:
    """What each data set of a plan contributes."""
    source_of = plan.source_of[: plan.samples]
    sample_of = plan.sample_of[: plan.samples]
    shares = []
    for number, (source, name, table) in enumerate(zip(plan.sources, plan.names, plan.tables, strict=True)):
        at = np.flatnonzero(source_of == number)
        drawn = sample_of[at]
        rows = np.unique(np.searchsorted(plan.starts, at, side="right") - 1)
        shares.append(
            SourceShare(
                name=name,
                size=len(source),
                samples=len(drawn),
                tokens=int(table.tokens[drawn].sum(dtype=np.int64)),
                trained_tokens=int(table.trained[drawn].sum(dtype=np.int64)),
                tiles=int(table.tiles[drawn].sum(dtype=np.int64)),
                rows=len(rows),
                steps=len(np.unique(rows // plan.rows_per_step)),
                left_out=int((table.tokens == 0).sum()),
            )
        )
    return tuple(shares)


def _of_rows(values: np.ndarray, dealt: np.ndarray) -> np.ndarray:
    """Values (steps, rows) of the rows that are dealt: (steps, rounds, world), 0 where there is none."""
    steps = np.arange(len(values))[:, None, None]
    return np.where(dealt == NO_ROW, 0, values[steps, dealt])


def _computed(values: np.ndarray, rows_per_micro_batch: int) -> np.ndarray:
    """What each micro-batch costs with its rows padded to the largest: (steps, micro-batches, world)."""
    steps, rounds, world = values.shape
    micro_batches = -(-rounds // rows_per_micro_batch)
    padded = np.zeros((steps, micro_batches * rows_per_micro_batch, world), dtype=np.int64)
    padded[:, :rounds] = values
    rows = padded.reshape(steps, micro_batches, rows_per_micro_batch, world)
    return rows.max(axis=2) * np.count_nonzero(rows, axis=2)
