"""What differed between two runs, stages or models: settings, data, versions, results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from mmit.errors import ConfigError
from mmit.train.report import results, timings
from mmit.train.report_insight import last_answers
from mmit.train.run_files import StageFiles, read_run_or_model

MISSING = "not there"

NAMES = ("name", "output", "stages")
"""Keys of a run file that name a run rather than say what it does, and its stages, which are compared one by one."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One thing that is not the same. kind: settings, data, versions, made with, results, answers or timings."""

    stage: str
    kind: str
    name: str
    first: Any
    second: Any


def differences(first: Path, second: Path) -> list[Difference]:
    """What differs between two runs, stage by stage, or between two stages or model directories. Raises ConfigError."""
    sides = [read_run_or_model(folder) for folder in (first, second)]
    if all(len(side) == 1 for side in sides):
        one, two = sides[0][0], sides[1][0]
        title = one.name if one.name == two.name else f"{one.name} / {two.name}"
        return list(_between(title, one, two))
    by_name = [{stage.name: stage for stage in side} for side in sides]
    if not by_name[0].keys() & by_name[1].keys():
        raise ConfigError(
            f"{first} and {second}: no stage is in both ({', '.join(by_name[0])}; {', '.join(by_name[1])}); compare "
            "the folders of two stages"
        )
    found: list[Difference] = []
    for name in dict.fromkeys([*by_name[0], *by_name[1]]):
        if name in by_name[0] and name in by_name[1]:
            found += _between(name, by_name[0][name], by_name[1][name])
        else:
            there = ["there" if name in side else MISSING for side in by_name]
            found.append(Difference(stage=name, kind="made with", name="stage", first=there[0], second=there[1]))
    return found


def difference_table(found: list[Difference], first: Path, second: Path) -> Table:
    """The differences for rich to print."""
    table = Table()
    for title in ("stage", "kind", "what", str(first), str(second)):
        table.add_column(Text(title), overflow="fold")
    for one in found:
        # as Text, in which rich sees no markup
        table.add_row(*map(Text, (one.stage, one.kind, one.name, _shown(one.first), _shown(one.second))))
    return table


def _between(title: str, one: StageFiles, two: StageFiles) -> Iterator[Difference]:
    first, second = _facts(one), _facts(two)
    for kind in (kind for kind in first if first[kind] and second[kind]):  # a model directory knows no timings
        for name in dict.fromkeys([*first[kind], *second[kind]]):
            values = first[kind].get(name, MISSING), second[kind].get(name, MISSING)
            if values[0] != values[1]:
                yield Difference(stage=title, kind=kind, name=name, first=values[0], second=values[1])


def _facts(stage: StageFiles) -> dict[str, dict[str, Any]]:
    """Kind -> name -> value of all that is known of a stage."""
    whole = {key: value for key, value in stage.config.items() if key not in NAMES}
    made_with = {name: stage.facts[name] for name in ("git", "ranks") if name in stage.facts}
    plan = {"plan": stage.facts["plan"]} if "plan" in stage.facts else {}
    return {
        "settings": dict(_paths(whole, "")) | dict(_paths(stage.stage, "stage")),
        "data": plan | dict(_paths(stage.facts.get("data"), "")),
        "versions": dict(_paths(stage.facts.get("versions"), "")) | dict(_paths(stage.facts.get("revisions"), "")),
        "made with": made_with,
        "results": results(stage),
        "answers": last_answers(stage),
        "timings": timings(stage),
    }


def _paths(value: Any, path: str) -> Iterator[tuple[str, Any]]:  # noqa: ANN401  (a YAML tree)
    """Path and value of every leaf; None is left out, as a run file's default."""
    below: Mapping[Any, Any] = {}
    if isinstance(value, Mapping):
        below = value
    elif isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
        below = {one.get("name", n) if isinstance(one, Mapping) else n: one for n, one in enumerate(value)}
    elif value is not None:
        yield path, list(value) if isinstance(value, tuple) else value
    for key, one in below.items():
        yield from _paths(one, f"{path}.{key}" if path else str(key))


def _shown(value: object) -> str:
    return f"{value:,.6g}" if isinstance(value, float) else str(value)
