"""``mmit demo``: from nothing to a model that demonstrably looks, on this machine, without a network.

A world is drawn, parts are made on the spot, two stages are trained by ``mmit train``, and what came of it is measured:
against the commonest answer, against the same model with a blank or another picture, and against tuning without
alignment on as many rows. Interrupted and started again, it goes on with what is complete.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from mmit.demo.dataset import write_split
from mmit.demo.measure import measure, overall_after, with_curves
from mmit.demo.page import Results, grid, write_page
from mmit.demo.parts import Parts, make_parts
from mmit.demo.progress import OneBar, train_with_bar
from mmit.demo.settings import FULL, TEST, DemoSettings, StageSettings
from mmit.errors import ConfigError

SIZES = {"full": FULL, "test": TEST}
_PHASES = {"world": 6.0, "parts": 45.0, "align": 8.0, "instruct": 18.0, "direct": 20.0, "asking": 12.0}
"""Roughly what each part of the story takes, in per cent of it."""


def run_demo(out: Path, *, size: str = "full", seeds: int = 1) -> Results:
    """The whole demo below ``out``; prints a table and the next commands, writes ``demo.html`` and ``scenes.png``.

    seeds: trainings of the comparison with and without alignment. Raises MmitError subclasses; Interrupted after
    Ctrl-C or SIGTERM.
    """
    if size not in SIZES:
        raise ConfigError(f"--size {size}: take {' or '.join(SIZES)}")
    settings = SIZES[size]
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    console = Console()
    started = time.monotonic()
    with OneBar(console, _PHASES) as bar:
        shards = _draw(out, settings, bar)
        parts = _make_parts(out, settings, bar)
        file = _write_run_file(out, settings, parts, shards)
        folder = out / "runs"
        for stage in ("align", "instruct", "direct"):
            train_with_bar(file, stage, folder, bar)
        stages = {name: folder / name for name in ("align", "instruct", "direct")}
        results = measure(settings, stages, shards, report=lambda what, share: bar.show("asking", share, what))
    curves = {name: (path / "loss.svg").read_text(encoding="utf-8") for name, path in stages.items()}
    results = with_curves(results, curves, _commands(out))
    (out / "peek.png").write_bytes(results.shown[0].picture)
    grid(results.shown).save(out / "scenes.png")
    write_page(results, out / "demo.html")
    _print(results, console, out, seconds=time.monotonic() - started)
    if seeds > 1:
        _compare_seeds(file, folder, shards["test"], seeds, console)
    return results


def _draw(out: Path, settings: DemoSettings, bar: OneBar) -> dict[str, Path]:
    total = sum(split.pictures for split in settings.splits)
    drawn = 0

    def one_more() -> None:
        nonlocal drawn
        drawn += 1
        bar.show("world", drawn / total, f"drawing {drawn} of {total} pictures")

    shards = {split.name: write_split(split, settings.world, out, on_picture=one_more) for split in settings.splits}
    bar.show("world", 1.0, "pictures drawn")
    return shards


def _make_parts(out: Path, settings: DemoSettings, bar: OneBar) -> Parts:
    steps = {"clip": settings.clip.steps, "language_model": settings.language.steps}
    shares = dict.fromkeys(steps, 0.0)
    losses = dict.fromkeys(steps, float("nan"))

    def on_step(name: str, step: int, loss: float) -> None:
        shares[name], losses[name] = step / steps[name], loss
        told = f"making a CLIP (loss {losses['clip']:.2f}) and a language model (loss {losses['language_model']:.2f})"
        bar.show("parts", sum(shares.values()) / 2, told)

    parts = make_parts(out / "parts", settings.world, settings.clip, settings.language, on_step=on_step)
    bar.show("parts", 1.0, "parts made")
    return parts


def _write_run_file(out: Path, settings: DemoSettings, parts: Parts, shards: Mapping[str, Path]) -> Path:
    """The run file of all three trainings; anyone can run it again with ``mmit train``."""
    align, instruct = settings.align, settings.instruct
    direct = instruct.steps + round(align.steps * align.rows_per_step / instruct.rows_per_step)
    content = {
        "name": "demo",
        "output": str(out / "runs"),
        "model": {
            "encoder": parts.encoder,
            "connector": {"type": "mlp", "depth": 2},
            "language_model": {"path": str(parts.language_model), "template": "chatml"},
        },
        "launch": {"cpu_ranks": min(2, os.cpu_count() or 1), "threads_per_rank": 1},
        "stages": {
            "align": _stage(settings.align, shards["align"], template="plain"),
            "instruct": {"init_from": "align", **_stage(settings.instruct, shards["instruct"])},
            # the same model without alignment, with as many rows in all
            "direct": _stage(settings.instruct, shards["instruct"], steps=direct),
        },
    }
    file = out / "demo.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return file


def _stage(stage: StageSettings, shards: Path, *, template: str = "model", steps: int | None = None) -> dict[str, Any]:
    return {
        "train": dict(stage.train),
        "data": {"mix": [{"shards": str(shards)}], "template": template, "workers": 0},
        "batch": {"length": stage.length, "tokens_per_step": stage.length * stage.rows_per_step},
        "epochs": stage.epochs,
        "max_steps": steps or stage.steps,
        "optim": {"warmup_fraction": stage.warmup_fraction},
        "save": {"every_steps": 50, "keep_last": 1},
        "log": {"every_steps": 10},
    }


def _commands(out: Path) -> tuple[str, ...]:
    return (
        f'mmit chat {out / "runs" / "instruct"} --image {out / "peek.png"} --prompt "what colour do you see?"',
        f"mmit chat {out / 'runs' / 'instruct'} --image {out / 'peek.png'}",
        f"mmit eval {out / 'runs' / 'instruct'} --data {out / 'shards' / 'test'} --pictures true --pictures blank",
        f"mmit serve {out / 'runs' / 'instruct'}",
        f"mmit train {out / 'demo.yaml'} --stage instruct seed=1 output={out / 'runs-1'}",
    )


def _print(results: Results, console: Console, out: Path, *, seconds: float) -> None:
    kinds = list(next(iter(results.accuracy.values())))
    table = Table("exact match on held-out pictures", *kinds)
    for name, scores in results.accuracy.items():
        table.add_row(name, *(f"{100 * scores[kind]:.0f}" for kind in kinds))
    console.print(table)
    losses = "   ".join(f"{name} {loss:.3f}" for name, loss in results.caption_loss.items())
    console.print(f"loss of the true caption after align: {losses}")
    for name, sentence in results.facts.items():
        console.print(f"{name}: {sentence}")
    console.print(f"{seconds / 60:.1f} minutes. Page: {out / 'demo.html'}   pictures: {out / 'scenes.png'}")
    console.print("Next:")
    for command in results.commands:
        console.print(f"  {command}", soft_wrap=True, highlight=False)


def _compare_seeds(file: Path, folder: Path, test: Path, seeds: int, console: Console) -> None:
    """With and without alignment once more for each further seed, printed as it comes out."""
    rows = []
    for seed in range(seeds):
        here = folder if seed == 0 else folder.with_name(f"runs-{seed}")
        with OneBar(console, {"align": 1, "instruct": 2, "direct": 3}) as bar:
            for stage in ("align", "instruct", "direct"):
                train_with_bar(file, stage, here, bar, overrides=(f"seed={seed}", f"output={here}"))
        rows.append([overall_after(here / stage, test) for stage in ("instruct", "direct")])
        console.print(f"seed {seed}: with align {rows[-1][0]:.1%}, without {rows[-1][1]:.1%}")
    mean = [sum(row[k] for row in rows) / len(rows) for k in (0, 1)]
    console.print(f"mean of {seeds} seeds: with align {mean[0]:.1%}, without {mean[1]:.1%}")
