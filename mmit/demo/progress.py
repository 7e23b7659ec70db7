"""One bar for the whole story, and trainings that move it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmit.errors import EXIT_INTERRUPTED, Interrupted, TrainingError


class OneBar:
    """A progress bar over several phases of known weight; without a terminal, one line for each phase."""

    def __init__(self, console: Console, phases: Mapping[str, float]) -> None:
        self._console = console
        self._phases = dict(phases)
        self._progress = Progress(
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=sum(phases.values()))
        self._current = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, phase: str, share: float, told: str) -> None:
        """Phase ``phase`` is done to ``share`` of it."""
        names = list(self._phases)
        before = sum(self._phases[name] for name in names[: names.index(phase)])
        self._progress.update(self._task, completed=before + share * self._phases[phase], description=told)
        if phase != self._current:
            self._current = phase
            if not self._console.is_terminal:
                self._console.print(f"{phase} ...")


def train_with_bar(file: Path, stage: str, folder: Path, bar: OneBar, *, overrides: Sequence[str] = ()) -> None:
    """``mmit train FILE --stage STAGE`` with its own output in ``folder``/STAGE.log; moves the bar by its metrics.

    Raises Interrupted where it was stopped, TrainingError where it failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{stage}.log"
    metrics = folder / stage / "metrics.jsonl"
    bar.show(stage, 0.0, f"{stage}: starting")
    with log.open("a", encoding="utf-8") as output:
        words = [sys.executable, "-m", "mmit", "train", str(file), *overrides, "--stage", stage]
        # its own session: Ctrl-C is passed on below, once
        child = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while child.poll() is None:
                _show(stage, metrics, log, bar)
                time.sleep(0.3)
        except KeyboardInterrupt:
            child.send_signal(signal.SIGTERM)
            child.wait()
            raise Interrupted("stopped; the same command goes on from here") from None
        finally:
            if child.poll() is None:
                child.terminate()
    if child.returncode == EXIT_INTERRUPTED:
        raise Interrupted("stopped; the same command goes on from here")
    if child.returncode != 0:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise TrainingError(f"stage {stage} failed: {' '.join(last).removeprefix('error: ')} (all of it in {log})")
    bar.show(stage, 1.0, f"{stage}: done")


def _show(stage: str, metrics: Path, log: Path, bar: OneBar) -> None:
    if not metrics.exists():
        return
    lines = metrics.read_text(encoding="utf-8").splitlines()
    if not lines or not lines[-1].endswith("}"):
        return
    record = json.loads(lines[-1])
    steps = _planned_steps(log)
    if steps:
        bar.show(stage, record["step"] / steps, f"{stage}: step {record['step']}/{steps} loss {record['loss']:.3f}")


def _planned_steps(log: Path) -> int | None:
    """The number of steps, from the newest ``step 1/200`` in the log."""
    for line in reversed(log.read_text(encoding="utf-8").splitlines()):
        if line.startswith("step "):
            return int(line.split()[1].split("/")[1])
    return None
