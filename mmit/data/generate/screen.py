"""What a person sees and does while a generation runs: a bar on standard error, and Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmit.data.generate.journal import Usage


@contextmanager
def noticing_signals(stop: Callable[[], None]) -> Generator[None]:
    """Let the first Ctrl-C or SIGTERM call ``stop``: an exception could lose an answer between two lines."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def notice(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, before[number])
        stop()

    before = {int(number): signal.signal(number, notice) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Bar:
    """A bar on standard error."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress = progress
        self.task = progress.add_task("generating", total=total)

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def step(self) -> None:
        """One question is settled."""
        self.progress.advance(self.task)

    def show(self, usage: Usage, cost: float, *, stopped: str) -> None:
        """What was used so far."""
        money = f", cost {cost:.4f}" if cost else ""
        what = f"{stopped}, waiting for answers under way" if stopped else "generating"
        text = f"{what} ({usage.prompt_tokens + usage.completion_tokens} tokens{money})"
        self.progress.update(self.task, description=text)


def open_bar(total: int, *, shown: bool) -> Bar:
    """A bar for ``total`` questions; not ``shown``, it does nothing."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Bar(Progress(*columns, console=Console(stderr=True), disable=not shown), total)
