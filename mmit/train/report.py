"""One HTML page about a run: settings, data, curves, timings, checkpoints; nothing outside it, every word escaped."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from mmit.data import open_source
from mmit.data.page import card, page, table
from mmit.errors import ConfigError, DataError
from mmit.train import report_insight
from mmit.train.curves import Points, line_chart, thinned
from mmit.train.run_files import StageFiles, read_run
from mmit.train.verdicts import best_of, verdicts

SHOWN_SAMPLES = 2
"""Samples of each source on the page."""
SHOWN_SKIPPED = 20

RECENT = 20
"""The final loss is the mean of so many last steps: that of one step depends on its samples."""


def write_report(folder: Path, out: Path) -> Path:
    """Write the page about the run or the stage in ``folder`` to ``out``. Raises ConfigError."""
    stages = read_run(folder)
    name = str(stages[0].config.get("name", folder.resolve().name))
    body = [part for stage in stages for part in _stage(stage)]
    body.append(f"<h2>Run file</h2><pre>{escape(yaml.safe_dump(dict(stages[-1].config), sort_keys=False))}</pre>")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page(f"run {name}", body), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror}") from None
    return out


def results(stage: StageFiles) -> dict[str, float]:
    """What a stage came to: losses in nats, held-out ones where they were measured."""
    found: dict[str, float] = {}
    if stage.steps:
        losses = _values(stage.steps[-RECENT:], "loss")
        found = {"steps done": stage.steps[-1]["step"]}
        if losses:
            found["final loss"] = statistics.mean(losses)
        found["trained tokens"] = sum(int(value) for value in _values(stage.steps, "trained_tokens"))
        found["skipped samples"] = sum(int(value) for value in _values(stage.steps, "skipped"))
        found["spikes of the loss"] = sum(bool(line.get("spike")) for line in stage.steps)
        measured = [ratios for line in stage.steps if (ratios := _under(line, "update_ratio"))]
        last_ratios = measured[-1] if measured else {}
        found |= {f"last update over weights: {part}": ratio for part, ratio in last_ratios.items()}
    if stage.held_out:
        last = stage.held_out[-1]
        found["held-out loss"] = last["loss"]
        found |= {f"held-out loss: {name}": loss for name, loss in _under(last, "loss_by_source").items()}
        found |= {f"visual gain: {name} picture": gain for name, gain in _under(last, "visual_gain").items()}
        if (best := best_of(stage.held_out)) is not None:
            found |= {"best held-out loss": best[1], "at step": best[0]}
        if text := _values(stage.held_out, "text_loss"):
            found |= {"loss on plain text, before": text[0], "loss on plain text": text[-1]}
    return found


def timings(stage: StageFiles) -> dict[str, float]:
    """Seconds of a step, tokens per second, the share of waiting for data, MFU and memory; of rank 0."""
    seconds = _values(stage.steps, "seconds")
    if not seconds or not sum(seconds):
        return {}
    found = {
        "seconds in all": sum(seconds),
        "seconds per step, median": statistics.median(seconds),
        "seconds per step, 95 of 100 below": sorted(seconds)[int(0.95 * (len(seconds) - 1))],
        "seconds per step, longest": max(seconds),
        "tokens per second": sum(_values(stage.steps, "tokens")) / sum(seconds),
        "share of waiting for data": sum(_values(stage.steps, "wait_seconds")) / sum(seconds),
    }
    found |= report_insight.mean_mfu(stage)
    if isinstance(peak := stage.device.get("peak_flops"), float):
        found["TFLOP per second in a matrix product, all devices"] = peak / 1e12
    if memory := _values(stage.steps, "memory_bytes"):
        found["most memory of rank 0, GiB"] = max(memory) / 2**30
    return found


def _stage(stage: StageFiles) -> Iterator[str]:
    planned = _under(stage.facts, "data").get("steps")
    done = stage.steps[-1]["step"] if stage.steps else 0
    state = "complete" if stage.is_complete else "not complete"
    yield f"<h2>Stage {escape(stage.name)}</h2>"
    yield f"<p>{escape(str(stage.folder))}: {done} steps{f' of {planned}' if planned else ''} done, {state}</p>"
    for title, facts in (("Results", results(stage)), ("Timings", timings(stage))):
        if facts:
            yield f"<h3>{title}</h3>" + table(("", ""), [(name, f"{value:,.5g}") for name, value in facts.items()])
    yield from report_insight.memory_table(stage)
    yield from report_insight.spikes(stage)
    yield from _curves(stage)
    yield from _held_out(stage)
    yield from report_insight.answers(stage)
    yield from _data(stage)
    if stage.checkpoints:
        rows = [(name, f"{size / 1e6:,.1f}") for name, size in stage.checkpoints.items()]
        yield "<h3>Checkpoints</h3>" + table(("name", "MB"), rows)
    made = [(name, str(found)) for name, found in _under(stage.facts, "versions").items()]
    made += [(name, str(stage.facts[name])) for name in ("git", "ranks", "plan") if name in stage.facts]
    if made:
        yield "<h3>Made with</h3>" + table(("", ""), made)


def _curves(stage: StageFiles) -> Iterator[str]:
    steps = stage.steps
    losses = {"training": _points(steps, "loss"), "held out": _points(stage.held_out, "loss")}
    speed = [
        (line["step"], line["tokens"] / line["seconds"]) for line in steps if line.get("seconds") and "tokens" in line
    ]
    charts: dict[str, dict[str, Points]] = {
        "loss": losses,
        "loss by source": _by_name(steps, "loss_by_source"),
        "held-out loss by source": _by_name(stage.held_out, "loss_by_source"),
        "loss on plain text": {"": _points(stage.held_out, "text_loss")},
        "visual gain": _by_name(stage.held_out, "visual_gain"),
        "learning rate": _by_name(steps, "lr"),
        "norm of the gradient": {"": _points(steps, "grad_norm")},
        "update over weights": _by_name(steps, "update_ratio"),
        "tokens per second": {"": speed},
        "MFU, share of the devices' matrix products": {"": _points(steps, "mfu")},
        "seconds per step": {"": _points(steps, "seconds")},
        "seconds waiting for data": {"": _points(steps, "wait_seconds")},
    }
    for title, lines in charts.items():
        shown = {name: thinned(points) for name, points in lines.items() if points}
        if shown:
            yield line_chart(shown, title=f"{stage.name}: {title}")


def _held_out(stage: StageFiles) -> Iterator[str]:
    if not stage.held_out:
        return
    for sentence in verdicts(stage.held_out, stage.folder).values():
        yield f'<p class="error">{escape(sentence)}</p>'
    last = stage.held_out[-1]
    gains = _under(last, "visual_gain_by_source")
    kinds = sorted({kind for gain in gains.values() if isinstance(gain, dict) for kind in gain})
    rows = [
        (name, _number(loss), *(_number(_under(gains, name).get(kind)) for kind in kinds))
        for name, loss in _under(last, "loss_by_source").items()
    ]
    head = ("source", "loss", *(f"gain over a {kind} picture" for kind in kinds))
    yield f"<h3>Held out, at step {last['step']}</h3>" + table(head, rows)


def _data(stage: StageFiles) -> Iterator[str]:
    sources = _under(stage.facts, "data").get("sources", [])
    skipped = Counter(str(line.get("source")) for line in stage.skipped)
    if sources:
        columns = ("name", "size", "samples", "tokens", "trained_tokens", "tiles", "left_out")
        rows = [(*(str(one.get(column)) for column in columns), str(skipped[str(one.get("name"))])) for one in sources]
        yield "<h3>Data</h3>" + table(tuple(column.replace("_", " ") for column in (*columns, "skipped")), rows)
    if stage.skipped:
        told = [tuple(str(line.get(name)) for name in ("step", "source", "id", "reason")) for line in stage.skipped]
        yield f"<h3>Skipped samples ({len(told)})</h3>"
        yield table(("step", "source", "id", "reason"), told[:SHOWN_SKIPPED])
    for source in _under(stage.stage, "data").get("mix", []):
        yield from _samples(source)


def _samples(source: Any) -> Iterator[str]:  # noqa: ANN401  (a YAML tree)
    """The first samples of a source, where its shards lie on this machine: a report fetches nothing."""
    where = source.get("shards") if isinstance(source, dict) else None
    if not isinstance(where, str) or not Path(where).expanduser().is_dir():
        return
    yield f"<h3>First samples of {escape(where)}</h3>"
    try:
        shards = open_source(where)
        for number in range(min(SHOWN_SAMPLES, len(shards))):
            yield card(shards.place(number)[1], shards.read(number))
    except DataError as error:
        yield f'<p class="error">cannot be shown: {escape(str(error))}</p>'


def _values(lines: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [line[key] for line in lines if isinstance(line.get(key), int | float)]


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]


def _by_name(lines: Sequence[Mapping[str, Any]], key: str) -> dict[str, Points]:
    """A curve for each name in the mappings at ``key``."""
    names = dict.fromkeys(name for line in lines for name in _under(line, key))
    return {name: _points([{"step": line["step"], **_under(line, key)} for line in lines], name) for name in names}


def _under(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The mapping at ``key``; empty where there is none."""
    value = content.get(key)
    return value if isinstance(value, dict) else {}


def _number(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else ""
