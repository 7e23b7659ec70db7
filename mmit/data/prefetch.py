"""Fetch the shards behind URLs that the next steps need, while the current one is read.

One thread of a rank looks ahead in the plan. What it fetches, and what is in use, is at most half of the cache, so that
nothing is thrown out before it was read. It is a convenience: a shard that does not come is left to the reader, who
tries again and then names it.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

from mmit.data.plan import Plan
from mmit.data.shard_set import ShardSet
from mmit.data.shards import ShardInfo
from mmit.errors import MmitError

_Key = tuple[int, str]
"""Number of the source, file of the shard."""


class Prefetch:
    """The thread of one rank; does nothing for a plan whose shards all lie on the disk.

    with Prefetch(plan, rank=0, world=8) as ahead:
        for step in steps:
            ahead.reached(step)
    """

    def __init__(self, plan: Plan, *, rank: int, world: int) -> None:
        self._plan = plan
        self._rank = rank
        self._world = world
        self._sets = {n: found for n, found in enumerate(plan.sources) if isinstance(found, ShardSet) and found.remote}
        self._remote = {number: found.remote for number, found in self._sets.items() if found.remote is not None}
        self._budget = min((remote.cache.max_bytes // 2 for remote in self._remote.values()), default=0)
        self._step = 0
        self._in_use: dict[_Key, tuple[int, int]] = {}  # the last step that needs it, as far as is known; its bytes
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the thread, after the shard that it is fetching now; the process does not wait for it."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def reached(self, step: int) -> None:
        """The rank now reads ``step``. The first call starts the thread: by then the loader's processes are forked."""
        if not self._remote:
            return
        with self._changed:
            self._step = step
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, args=(step,), name="prefetch", daemon=True)
            self._thread.start()

    def _run(self, first: int) -> None:
        for step in range(first, self._plan.steps):
            for key, shard in self._needed(step).items():
                if self._is_closed:
                    return
                if key not in self._in_use and self._room_for(shard, step):
                    try:
                        self._remote[key[0]].fetch(shard)
                    except (MmitError, OSError):
                        continue  # the reader will find out, and say so
                self._in_use[key] = (step, shard.bytes)

    def _needed(self, step: int) -> dict[_Key, ShardInfo]:
        """The remote shards of this rank's samples of a step, in the order of reading."""
        found: dict[_Key, ShardInfo] = {}
        for row in self._plan.step_of_rank(step, rank=self._rank, world=self._world):
            for source, number in row.samples:
                if source in self._sets:
                    shard = self._sets[source].shard_of(number)
                    found[source, shard.file] = shard
        return found

    def _room_for(self, shard: ShardInfo, step: int) -> bool:
        """Wait until a shard fits beside those in use; False where the reader was there first, or at the end."""
        with self._changed:
            while not self._is_closed and self._step <= step:
                self._in_use = {key: used for key, used in self._in_use.items() if used[0] >= self._step}
                if sum(size for _, size in self._in_use.values()) + shard.bytes <= self._budget:
                    return True
                if self._step == step:
                    return False
                self._changed.wait()
        return False
