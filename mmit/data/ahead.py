"""Items of a dataset in order, made ahead of time by processes that outlive a scheduler's signal and nothing else."""

from __future__ import annotations

import atexit
import os
import re
import signal
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from mmit.errors import DataError

Item = TypeVar("Item")

_TORCH_SAYS = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (is killed by signal: \w+|exited)")
_LOST = (
    "a worker that reads data {what}; the system kills one where memory is short: free some or set data.workers lower, "
    "and run the same command again"
)


def made_ahead(items: Dataset[Item], *, workers: int, ahead: int = 2) -> Generator[Item]:
    """Every item of ``items``, in order; tensors in it are in page-locked memory where there is a GPU.

    workers: processes that work ahead, each by ``ahead`` items; 0 makes them in this one.
    """
    source = DataLoader(
        items,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=max(2, ahead) if workers else None,
        worker_init_fn=_serve_the_rank,
        pin_memory=torch.cuda.is_available(),
        in_order=True,
    )
    # The workers ignore SIGTERM, with which multiprocessing would end them at exit and then wait for them: the only
    # reference to them is dropped instead, here or at exit, and torch closes them.
    made: list[Iterator[Item]] = [iter(source)]
    atexit.register(made.clear)
    try:
        while True:
            try:
                item = next(made[0])
            except StopIteration:
                return
            except (EOFError, ConnectionError) as error:
                if "in DataLoader worker process" in str(error):  # raised by ``items`` there
                    raise
                # the worker ended while it handed over an item
                raise DataError(_LOST.format(what="has ended while it was asked for data")) from error
            yield item
    finally:
        made.clear()
        atexit.unregister(made.clear)


@contextmanager
def lost_workers_named() -> Generator[None]:
    """Turn torch's error of a worker that was killed, which comes at any point of the main thread, into a sentence.

    Raises DataError.
    """
    try:
        yield
    except RuntimeError as error:
        found = _TORCH_SAYS.search(str(error))
        if found is None:
            raise
        if "shared memory" in str(error):
            raise DataError(
                "the shared memory of this machine (/dev/shm) is full: make it larger (docker: --shm-size), or set "
                "data.workers lower, and run the same command again"
            ) from error
        what = f"(process {found[1]}) {found[2].replace('is killed', 'was ended')}"
        raise DataError(_LOST.format(what=what)) from error


def _serve_the_rank(worker: int) -> None:
    """Keep a worker alive through Ctrl-C and a scheduler's SIGTERM, which reach the whole process group, and silent
    about the end of its rank.

    The rank needs its workers to finish its step. They end when the loader is closed, and notice when the rank is gone.
    """
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    rank, report = os.getppid(), sys.excepthook

    def report_unless_alone(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not (isinstance(error, ConnectionError | EOFError) and _is_gone(rank)):
            report(kind, error, trace)

    # called by multiprocessing's thread that hands tensors to the rank, when the rank is killed while it takes one
    sys.excepthook = report_unless_alone


def _is_gone(rank: int) -> bool:
    """Whether this process has lost ``rank``, its parent, whose connections close a moment before it ends."""
    patience = time.monotonic() + 1
    while os.getppid() == rank and time.monotonic() < patience:
        time.sleep(0.01)
    return os.getppid() != rank
