"""Items of a dataset in order, made ahead of time by processes that outlive a scheduler's signal and nothing else."""

from __future__ import annotations

import atexit
import signal
from collections.abc import Generator, Iterator
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

Item = TypeVar("Item")


def made_ahead(items: Dataset[Item], *, workers: int, ahead: int = 2) -> Generator[Item]:
    """Every item of ``items``, in order; tensors in it are in page-locked memory where there is a GPU.

    workers: processes that work ahead, each by ``ahead`` items; 0 makes them in this one.
    """
    source = DataLoader(
        items,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=max(2, ahead) if workers else None,
        worker_init_fn=_ignore_signals,
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
            yield item
    finally:
        made.clear()
        atexit.unregister(made.clear)


def _ignore_signals(worker: int) -> None:
    """Keep workers alive through Ctrl-C and a scheduler's SIGTERM, which reach the whole process group.

    The rank needs them to finish its step. They end when the loader is closed, and notice when the rank is gone.
    """
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
