"""Spread independent tasks over processes: the first failure ends all, and no process outlives its parent.

The standard executor leaves its workers waiting for ever when the parent is killed, and the standard pool waits for
ever when a worker is; here both ends notice, because each worker has a pipe of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmit.errors import DataError, MmitError

Task = TypeVar("Task")
Result = TypeVar("Result")


def run(work: Callable[[Task], Result], tasks: Sequence[Task], *, processes: int) -> Iterator[Result]:
    """``work(task)`` for every task, as they finish, in any order.

    processes: 1 works in this process. A worker is a fork, so ``work`` may hold large data; results are pickled.
    Raises what ``work`` raised; DataError where a worker was killed.
    """
    processes = min(processes, len(tasks))
    if processes <= 1:
        yield from map(work, tasks)
        return
    with closing(_run(work, tasks, processes)) as results:
        yield from results


def with_progress(
    results: Iterator[Result], *, title: str, total: int, count: Callable[[Result], int], shown: bool
) -> Iterator[Result]:
    """The same results, with a bar on standard error where ``shown``; each is worth ``count`` of ``total``."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task(title, total=total)
        for result in results:
            bar.advance(task, count(result))
            yield result


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class _Failure:
    error: MmitError | None
    text: str


def _run(work: Callable[[Task], Result], tasks: Sequence[Task], processes: int) -> Generator[Result]:
    context = multiprocessing.get_context("fork")
    ours: list[Connection] = []
    workers: list[BaseProcess] = []
    try:
        for _ in range(processes):
            mine, theirs = context.Pipe()
            ours.append(mine)
            # the child closes its copies of the parent's ends, or it would never see that the parent is gone
            worker = context.Process(target=_work, args=(work, theirs, list(ours)), daemon=True)
            worker.start()
            theirs.close()
            workers.append(worker)
        yield from _hand_out(tasks, ours, workers)
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()
        for connection in ours:
            connection.close()


def _hand_out(tasks: Sequence[Task], ours: list[Connection], workers: list[BaseProcess]) -> Iterator[Result]:
    waiting = iter(tasks)
    busy = 0
    for connection in ours:
        connection.send(next(waiting))
        busy += 1
    while busy:
        for ready in wait(ours):
            assert isinstance(ready, Connection)
            try:
                result = ready.recv()
            except EOFError:
                worker = workers[ours.index(ready)]
                worker.join()
                raise DataError(
                    f"a worker process ended with code {worker.exitcode} (-9: it was killed, most often for memory); "
                    "run again with fewer processes"
                ) from None
            busy -= 1
            if isinstance(result, _Failure):
                if result.error is not None:
                    raise result.error
                raise RuntimeError(f"in a worker process:\n{result.text}")
            task = next(waiting, None)
            if task is not None:
                ready.send(task)
                busy += 1
            yield result


def _die_with_parent() -> None:
    """End at once when the parent is killed, and not only after the task at hand: it may hold a lock."""
    if sys.platform == "linux":
        import ctypes

        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _work(work: Callable[[Task], Result], connection: Connection, others: list[Connection]) -> None:
    for other in others:
        other.close()
    _die_with_parent()
    # Ctrl-C reaches the whole process group; the parent decides what becomes of the workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            result: Result | _Failure = work(task)
        except MmitError as error:
            result = _Failure(error, "")
        except BaseException:  # noqa: BLE001  (handed to the parent, which raises)
            result = _Failure(None, traceback.format_exc())
        try:
            connection.send(result)
        except BrokenPipeError:
            return
