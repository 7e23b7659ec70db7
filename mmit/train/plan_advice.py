"""What to take from a stage's plan: the first way that fits, and the changes to the run file that ask for it."""

from __future__ import annotations

from dataclasses import dataclass

from mmit.train.planner import Choice, StagePlan


@dataclass(frozen=True, kw_only=True)
class Advice:
    """choice: the way to take, None where none fits. sentence: for people. overrides: for the command line."""

    choice: Choice | None
    sentence: str
    overrides: tuple[str, ...] = ()


def advice(plan: StagePlan) -> Advice:
    """What to change so that the stage fits a device; the overrides are valid together."""
    best, length, least = plan.best, plan.workload.row.tokens, _shortest(plan)
    room = f"{plan.machine.memory / 2**30:.4g} GiB"
    if best is None or best.tokens < min(length, least):
        return Advice(
            choice=None,
            sentence=f"nothing fits {room}, not even rows of {least} tokens: take more ranks, adapters (lora) with "
            "lora.quantize: nf4, freeze more, or make DeepSpeed's buckets smaller (docs/planner.md)",
        )
    told = best.way.overrides(plan.name, plan.stage)
    if best.bytes <= plan.machine.memory:
        sentence = f"{best.way} fits: about {best.bytes / 2**30:.1f} of {room} on each rank"
        more = best.tokens // length
        sentence += f", with up to {more} rows of {length} tokens at a time" if more > 1 else ""
    elif best.tokens >= length:
        rows = _divisor(plan.stage.batch.rows_per_step, most=best.tokens // length)
        sentence = f"{best.way} fits {room} with rows_per_micro_batch {rows}"
        told.append(f"stages.{plan.name}.batch.rows_per_micro_batch={rows}")
    else:
        shorter = _round(best.tokens, least=least)
        sentence = (
            f"no way fits a row of {length} tokens into {room}; {best.way} fits rows of up to {best.tokens} tokens, "
            f"say {shorter} (samples that are longer no longer fit a row)"
        )
        told += _batch(plan, shorter)
    return Advice(choice=best, sentence=sentence, overrides=tuple(told))


def _batch(plan: StagePlan, length: int) -> list[str]:
    """Rows of ``length`` tokens, and the step as near to the one of before as whole rows allow."""
    rows = max(1, round(plan.stage.batch.tokens_per_step / length))
    return [
        f"stages.{plan.name}.batch.length={length}",
        f"stages.{plan.name}.batch.tokens_per_step={rows * length}",
        f"stages.{plan.name}.batch.rows_per_micro_batch=1",
    ]


def _shortest(plan: StagePlan) -> int:
    """Tokens of the shortest row that is worth naming: one tile, where rows have some, and as many of text."""
    row = plan.workload.row
    return 2 * plan.tile_tokens if row.tiles else 1


def _round(tokens: int, *, least: int) -> int:
    """The power of two below, or ``least`` where that is shorter."""
    return max(2 ** (tokens.bit_length() - 1), least)


def _divisor(whole: int, *, most: int) -> int:
    """The largest divisor up to ``most``."""
    return next(number for number in range(min(whole, most), 0, -1) if whole % number == 0)
