"""A rank that stalls ends the run with its name, instead of leaving all others to wait in a collective.

Each rank marks what it is doing. A thread of its own publishes that every second in a store that rank 0 keeps, so a
rank whose main thread hangs is still heard, and one that is stopped is not. The threads of ranks 0 and 1 judge; the
second is there for the case that the first is the one that stalls. Nothing of this waits for a device or a collective.

Judging begins with the second step: loading and the first step may take as long as they take.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
from torch.distributed import TCPStore

from mmit.distributed import all_reduce_sum, logger, rank, world_size
from mmit.train.engine import device
from mmit.train.lifeline import note_error

BEAT_SECONDS = 1.0
QUIET_SECONDS = 3 * BEAT_SECONDS
"""After such a silence of another rank, ranks that compute are not blamed before that one is."""
SLOWER = 10.0
"""A phase may take so many times the longest of its kind so far before it counts as a stall."""
SLOWER_THAN_FIRST = 2.0
"""Computing may take so many times as long as in the first step, which warms up, but measures a slow machine.

Reading in the first step is no measure: it starts the processes that read.
"""

READING, COMPUTING, WAITING, SAVING = "reading", "computing", "waiting for the other ranks at", "saving after"
EVALUATING = "evaluating after"
"""What a rank does. Waiting is the fault of another, the last two may take long: only the first two can stall."""


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank says of itself: its phase, for how many seconds, of which step (1-based), and with which samples.

    limit: seconds after which the phase counts as a stall; 0 before judging begins. number: counts up with each beat.
    """

    number: int
    host: str
    step: int
    phase: str
    seconds: float
    limit: float
    samples: str = ""


def verdict(beats: Mapping[int, Beat], silent: Mapping[int, float], *, limit: float) -> str | None:
    """The sentence that ends the run, or None while all is well.

    silent: seconds since the last beat of each rank. limit: of those seconds.
    """
    armed = any(beat.limit for beat in beats.values())
    for number, beat in sorted(beats.items()):
        if armed and silent[number] > limit:
            return (
                f"rank {number} on {beat.host} has not been heard for {silent[number]:.0f} s: it was stopped, or its "
                f"machine is gone; last {beat.phase} step {beat.step}{_at(beat)}"
            )
    stalled = {number: beat for number, beat in sorted(beats.items()) if beat.limit and beat.seconds > beat.limit}
    # A rank that reads keeps the others waiting; of ranks that compute, one may wait for another in the backward pass.
    # And all of them wait for one that is gone, which is known for certain when it has been silent for long enough.
    quiet = any(silent[number] > QUIET_SECONDS for number in beats)
    for phase in (READING,) if quiet else (READING, COMPUTING):
        found = [
            f"rank {number} on {beat.host} has stalled: {phase} step {beat.step} for {beat.seconds:.0f} s{_at(beat)}"
            for number, beat in stalled.items()
            if beat.phase == phase
        ]
        if found:
            return f"{'; '.join(found)}. See disk, network and memory there, or raise launch.stall_seconds"
    return None


def _at(beat: Beat) -> str:
    return f" ({beat.samples})" if beat.samples else ""


class Watchdog:
    """The heartbeat of this rank; ``mark`` says what it does from now on.

    stall_seconds: longest phase, and longest silence; 0 watches nothing. reading: tells which sample is being read.
    Creating one is collective where there are several ranks.
    """

    def __init__(self, *, stall_seconds: float, reading: Callable[[], str]) -> None:
        self._stall_seconds = stall_seconds
        self._reading = reading
        self._phase, self._since, self._step, self._samples = "starting", time.monotonic(), 0, ""
        self._usual: dict[str, float] = {}  # seconds that each phase may take, by what it took
        self._steps_done = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        if stall_seconds:
            post = _Post.open(self.beat(0))
            self._thread = threading.Thread(target=self._watch, args=(post,), name="watchdog", daemon=True)
            self._thread.start()

    def mark(self, phase: str, *, step: int, samples: Sequence[str] = ()) -> None:
        """From now on this rank does ``phase`` of ``step`` (1-based), with these samples."""
        now = time.monotonic()
        if self._steps_done or self._phase == COMPUTING:
            usual = (SLOWER if self._steps_done else SLOWER_THAN_FIRST) * (now - self._since)
            self._usual[self._phase] = max(self._usual.get(self._phase, 0.0), usual)
        self._steps_done += step > self._step > 0
        self._phase, self._since, self._step = phase, now, step
        self._samples = ", ".join(samples[:4]) + (" ..." if len(samples) > 4 else "")

    def close(self) -> None:
        """Stop watching."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=5 * BEAT_SECONDS)

    def beat(self, number: int) -> Beat:
        """What this rank says of itself now."""
        phase, since, step = self._phase, self._since, self._step
        return Beat(
            number=number,
            host=socket.gethostname(),
            step=step,
            phase=phase,
            seconds=time.monotonic() - since,
            limit=max(self._stall_seconds, self._usual.get(phase, 0.0)) if self._steps_done else 0.0,
            samples=self._reading() if phase == READING else self._samples,
        )

    def _watch(self, post: _Post) -> None:
        number = 0
        while not self._ended.wait(BEAT_SECONDS):
            number += 1
            beats = post.exchange(self.beat(number))
            sentence = verdict(beats, post.silent(), limit=self._stall_seconds)
            if sentence and not self._ended.is_set():
                logger.error("error: %s", sentence)
                note_error(sentence)
                os._exit(1)  # the main thread waits in a collective and will not come back


class _Post:
    """Where the beats of all ranks lie; only ranks 0 and 1 read those of others."""

    def __init__(self, store: TCPStore | None, ranks: Sequence[int]) -> None:
        self._store = store
        self._ranks = ranks
        self._beats: dict[int, Beat] = {}
        self._heard: dict[int, float] = {}

    @classmethod
    def open(cls, first: Beat) -> _Post:
        """Connect all ranks and hear the first beat of each, from which on silence counts; collective."""
        if world_size() == 1:
            return cls(None, [0])
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        patience = timedelta(seconds=5 * BEAT_SECONDS)
        own = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=patience) if rank() == 0 else None
        port = int(all_reduce_sum(torch.tensor([own.port if own else 0], device=device())))
        store = own or TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=patience)
        post = cls(store, range(world_size()) if rank() < 2 else [])
        post._leave(store, first)
        all_reduce_sum(torch.tensor([0], device=device()))  # until all have
        post._collect(store)
        return post

    def exchange(self, beat: Beat) -> dict[int, Beat]:
        """Leave the own beat and give the last known ones of the ranks that this rank judges."""
        if self._store is None:
            self._hear(0, beat)
            return dict(self._beats)
        self._hear(rank(), beat)  # this one is alive, whether the store can be reached or not
        answered = threading.Event()
        threading.Thread(target=self._talk, args=(self._store, beat, answered), daemon=True).start()
        answered.wait(BEAT_SECONDS)  # a store whose process is stopped never answers: its rank is then silent
        return dict(self._beats)

    def silent(self) -> dict[int, float]:
        """Seconds since each judged rank was last heard."""
        now = time.monotonic()
        return {number: now - heard for number, heard in self._heard.items()}

    def _talk(self, store: TCPStore, beat: Beat, answered: threading.Event) -> None:
        try:
            self._leave(store, beat)
            self._collect(store)
        except (RuntimeError, ValueError):  # torch's errors of a store that is gone; silence tells the rest
            return
        answered.set()

    def _leave(self, store: TCPStore, beat: Beat) -> None:
        store.set(f"beat/{rank()}", json.dumps(asdict(beat)))

    def _collect(self, store: TCPStore) -> None:
        for number in self._ranks:
            self._hear(number, Beat(**json.loads(store.get(f"beat/{number}"))))

    def _hear(self, number: int, beat: Beat) -> None:
        before = self._beats.get(number)
        if before is None or before.number != beat.number:
            self._beats[number] = beat
            self._heard[number] = time.monotonic()
