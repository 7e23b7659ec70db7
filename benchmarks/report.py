"""Medians with their ranges, and the ratios of runs that were next to each other in time."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

PACKAGES = ("mmit", "torch", "transformers", "deepspeed")
COLUMNS = (
    ("samples_per_second", "samples/s", ".2f"),
    ("trained_tokens_per_second", "trained tokens/s", ".0f"),
    ("cpu_seconds_per_sample", "CPU s/sample", ".4f"),
    ("peak_mib", "peak MiB", ".0f"),
    ("loss", "loss", ".3f"),
)
RATIOS = (
    ("cpu_seconds_per_sample", "CPU time", True),
    ("samples_per_second", "samples/s", False),
    ("peak_mib", "memory", True),
)


@dataclass(frozen=True, kw_only=True)
class Result:
    """All rounds of one size and stage: figures of mmit and of the other system, round by round."""

    facts: dict[str, Any]
    mmit: list[dict[str, float]]
    trainer: list[dict[str, float]]

    def ratio(self, name: str, *, less_is_better: bool) -> list[float]:
        """How many times better mmit was, in each round."""
        pairs = zip(self.mmit, self.trainer, strict=True)
        return [their[name] / our[name] if less_is_better else our[name] / their[name] for our, their in pairs]


def machine() -> dict[str, Any]:
    """What it ran on, and with what."""
    return {
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def markdown(results: Sequence[Result]) -> str:
    """Two tables: the figures of both systems, and mmit's ratios to the padded Trainer (above 1 is better)."""
    head = ["size", "stage", "system", *(title for _, title, _ in COLUMNS)]
    rows = [
        [
            result.facts["size"],
            str(result.facts["stage"]),
            name,
            *(_cell([run[key] for run in runs], form) for key, _, form in COLUMNS),
        ]
        for result in results
        for name, runs in (("mmit", result.mmit), ("Trainer, padded", result.trainer))
    ]
    ratio_head = ["size", "stage", *(f"{title}, times better" for _, title, _ in RATIOS)]
    ratio_rows = [
        [
            result.facts["size"],
            str(result.facts["stage"]),
            *(_cell(result.ratio(key, less_is_better=less), ".2f") for key, _, less in RATIOS),
        ]
        for result in results
    ]
    return _table(head, rows) + "\n" + _table(ratio_head, ratio_rows)


def write(results: Sequence[Result], folder: Path, *, command: str) -> None:
    """Write ``training.json`` (every round) and ``training.md`` (the tables) into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "command": command,
        "machine": machine(),
        "results": [{**result.facts, "mmit": result.mmit, "trainer": result.trainer} for result in results],
    }
    (folder / "training.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    on = ", ".join(f"{key} {value}" for key, value in machine().items())
    (folder / "training.md").write_text(f"`{command}`\n\n{on}\n\n{markdown(results)}", encoding="utf-8")


def _cell(values: Sequence[float], form: str) -> str:
    middle = format(median(values), form)
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}}-{max(values):{form}})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
