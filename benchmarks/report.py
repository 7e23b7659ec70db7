"""Medians with their ranges, and the ratios of runs that were next to each other in time."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from chart import Bars, bar_chart
from systems import BASE, OURS, PEERS, TITLES

PACKAGES = ("mmit", "torch", "transformers", "deepspeed", "trl")
CPU, WALL, MEMORY = "cpu_seconds_per_sample", "samples_per_second", "peak_mib"
COLUMNS = (
    (WALL, "samples/s", ".2f"),
    ("tokens_per_second", "tokens/s", ".0f"),
    ("trained_tokens_per_second", "trained tokens/s", ".0f"),
    (CPU, "CPU s/sample", ".4f"),
    (MEMORY, "peak MiB", ".0f"),
    ("loss", "loss", ".3f"),
)
AIMS = {("tiny", 1): 1.45, ("tiny", 2): 2.0, ("small", 1): 1.25, ("small", 2): 1.75}
"""How many times less CPU time than the padded Trainer mmit is to take, by size and stage."""
AIM_OVER_BEST = {2: 1.4}
"""How many times less than the best of the others, by stage."""

Figures = dict[str, float]


@dataclass(kw_only=True)
class Result:
    """All rounds of one size, stage and number of ranks: the figures of each system, round by round."""

    facts: dict[str, Any]
    rounds: list[dict[str, Figures]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """As rows of a table and groups of a chart are called."""
        ranks = self.facts["ranks"]
        return f"{self.facts['size']}, stage {self.facts['stage']}, {ranks} rank{'s'[: ranks > 1]}"

    @property
    def systems(self) -> list[str]:
        """Those that were measured, in the order of the tables."""
        return [name for name in TITLES if any(name in found for found in self.rounds)]

    def figures(self, system: str, key: str) -> list[float]:
        """One figure of a system in each round that measured it."""
        return [found[system][key] for found in self.rounds if system in found]

    def ratios(self, system: str, other: str, key: str) -> list[float]:
        """How many times better than ``other`` a system was, in each round that measured both."""
        pairs = [(found[system][key], found[other][key]) for found in self.rounds if {system, other} <= found.keys()]
        return [mine / theirs if key == WALL else theirs / mine for mine, theirs in pairs]

    def best_peer(self, key: str) -> str | None:
        """The other system with the best median; of samples/s the largest, of all else the smallest."""
        there = [system for system in self.systems if system in PEERS]
        best = max if key == WALL else min
        return best(there, key=lambda system: median(self.figures(system, key)), default=None)


def machine() -> dict[str, Any]:
    """What it ran on, and with what."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = f"{os.getloadavg()[0]:.1f}"
    return {
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "GiB": round(memory),
        "load": load,
        "python": platform.python_version(),
        **versions,
    }


def summary(results: Sequence[Result], *, key: str = CPU) -> str:
    """One line for each size, stage and number of ranks: every system against the padded Trainer, by one figure."""
    systems = [name for name in TITLES if any(name in result.systems for result in results)]
    last = ["mmit, aim", "mmit over the best other", "aim", "less memory than the least other"]
    head = ["", *(TITLES[name] for name in systems), *last]
    rows = []
    for result in results:
        size, stage = result.facts["size"], result.facts["stage"]
        rivals = [result.best_peer(figure) for figure in (key, MEMORY)]
        over = [
            _cell(result.ratios(OURS, rival, figure), ".2f") if rival else ""
            for rival, figure in zip(rivals, (key, MEMORY), strict=True)
        ]
        named = f"{over[0]} ({TITLES[rivals[0]]})" if rivals[0] and over[0] else ""
        rows.append(
            [
                result.name,
                *(_cell(result.ratios(name, BASE, key), ".2f") for name in systems),
                format(AIMS.get((size, stage), ""), ""),
                named,
                format(AIM_OVER_BEST.get(stage, ""), ""),
                over[1],
            ]
        )
    return _table(head, rows)


def details(results: Sequence[Result]) -> str:
    """Every figure of every system: median (range over the rounds)."""
    head = ["", "system", *(title for _, title, _ in COLUMNS), "rounds"]
    rows = [
        [
            result.name,
            TITLES[system],
            *(_cell(result.figures(system, key), form) for key, _, form in COLUMNS),
            str(len(result.figures(system, CPU))),
        ]
        for result in results
        for system in result.systems
    ]
    return _table(head, rows)


def markdown(results: Sequence[Result], *, command: str, on: dict[str, Any]) -> str:
    """The command, the machine and all tables."""
    return (
        f"{heading(results, command=command, on=on)}{summary(results)}\n"
        f"The same by the wall clock, which waiting for the other rank counts in:\n\n{summary(results, key=WALL)}\n"
        f"{details(results)}"
    )


def heading(results: Sequence[Result], *, command: str, on: dict[str, Any]) -> str:
    """What was run, where, and how the summary is to be read."""
    where = ", ".join(f"{key} {value}" for key, value in on.items())
    steps = sorted({(r.facts["size"], r.facts["stage"], r.facts["steps"], r.facts["samples"]) for r in results})
    timed = "; ".join(f"{size} stage {stage}: {samples} samples in {n} steps" for size, stage, n, samples in steps)
    return (
        f"`{command}`\n\n{where}. Timed in each run: {timed}.\n\n"
        "How many times less CPU time than the padded Trainer (above 1 is faster): median (range) of the rounds.\n\n"
    )


def chart(results: Sequence[Result]) -> str:
    """The summary as bars, an SVG."""
    groups = [
        Bars(
            title=result.name,
            values={
                TITLES[s]: median(result.ratios(s, BASE, CPU)) for s in result.systems if result.ratios(s, BASE, CPU)
            },
        )
        for result in results
    ]
    return bar_chart(
        [group for group in groups if group.values],
        order=tuple(TITLES.values()),
        title="Training speed by CPU time, padded Trainer = 1",
        mark=1.0,
    )


def write(results: Sequence[Result], folder: Path, *, command: str, on: dict[str, Any]) -> None:
    """Write ``training.json`` (every round), ``training.md`` (the tables) and ``training.svg`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"command": command, "machine": on, "results": [asdict(result) for result in results]}
    (folder / "training.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / "training.md").write_text(markdown(results, command=command, on=on), encoding="utf-8")
    (folder / "training.svg").write_text(chart(results), encoding="utf-8")


def read(folder: Path) -> tuple[list[Result], str, dict[str, Any]]:
    """What ``write`` wrote: results, command and machine."""
    content = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    return [Result(**result) for result in content["results"]], content["command"], content["machine"]


def replace_section(page: Path, name: str, text: str) -> bool:
    """Put ``text`` between the comments ``<!-- name -->`` and ``<!-- end of name -->`` of a page that has them."""
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        return False
    page.write_text(f"{before}{start}{text.rstrip()}\n{end}{after}", encoding="utf-8")
    return True


def _cell(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
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
