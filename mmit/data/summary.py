"""What a plan amounts to, in numbers and as a table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from rich.table import Table

from mmit.data.plan import Plan


@dataclass(frozen=True, kw_only=True)
class SourceShare:
    """What one data set contributes over the whole plan; repetitions count."""

    name: str
    size: int
    samples: int
    tokens: int
    trained_tokens: int
    images: int
    left_out: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A plan in numbers.

    fill: share of the row places that hold tokens. useful: real tokens over ranks x slowest rank, mean over steps.
    """

    sources: tuple[SourceShare, ...]
    steps: int
    rows: int
    fill: float
    useful: float
    world: int


def summarize(plan: Plan, *, length: int, world: int = 1) -> Summary:
    """The numbers of a plan with rows of ``length`` tokens, as ``world`` ranks would run it."""
    source_of = plan.source_of[: plan.samples]
    sample_of = plan.sample_of[: plan.samples]
    shares = []
    for number, (source, table) in enumerate(zip(plan.sources, plan.tables, strict=True)):
        drawn = sample_of[source_of == number]
        shares.append(
            SourceShare(
                name=source.name,
                size=len(source),
                samples=len(drawn),
                tokens=int(table.tokens[drawn].sum(dtype=np.int64)),
                trained_tokens=int(table.trained[drawn].sum(dtype=np.int64)),
                images=int(table.images[drawn].sum(dtype=np.int64)),
                left_out=int((table.tokens == 0).sum()),
            )
        )
    tokens = np.zeros(plan.steps * plan.rows_per_step, dtype=np.int64)
    tokens[: plan.rows] = plan.tokens[: plan.rows]
    per_rank = np.zeros((plan.steps, world), dtype=np.int64)
    for rank in range(world):
        per_rank[:, rank] = tokens.reshape(plan.steps, -1)[:, rank::world].sum(axis=1)
    return Summary(
        sources=tuple(shares),
        steps=plan.steps,
        rows=plan.rows,
        fill=float(tokens.sum() / (plan.rows * length)),
        useful=float(tokens.sum() / (world * per_rank.max(axis=1).sum())),
        world=world,
    )


def summary_table(summary: Summary) -> Table:
    """The numbers for rich to print: a line for each source, and one for all."""
    total = sum(share.tokens for share in summary.sources)
    title = (
        f"{summary.steps} steps, {summary.rows} rows filled to {summary.fill:.1%}; "
        f"useful work on {summary.world} ranks {summary.useful:.1%}"
    )
    table = Table("source", title=title)
    for column in ("size", "samples", "tokens", "share", "trained", "images", "left out"):
        table.add_column(column, justify="right")
    for share in summary.sources:
        counts = (share.trained_tokens, share.images, share.left_out)
        table.add_row(
            share.name,
            f"{share.size:,}",
            f"{share.samples:,}",
            f"{share.tokens:,}",
            f"{share.tokens / total:.1%}",
            *(f"{count:,}" for count in counts),
        )
    return table
