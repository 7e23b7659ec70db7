"""Who is named when a rank stalls."""

import json
import time
from dataclasses import asdict, replace
from datetime import timedelta

import pytest
import torch
from torch.distributed import TCPStore

from mmit.train import watchdog
from mmit.train.watchdog import COMPUTING, READING, SAVING, WAITING, Beat, Watchdog, _Post, verdict

FINE = Beat(number=9, host="a", step=7, phase=WAITING, seconds=40.0, limit=25.0)
READS = Beat(number=9, host="b", step=7, phase=READING, seconds=41.0, limit=25.0, samples="s.tar: k7, for 40 s")
HEARD = {0: 1.0, 1: 1.0}


def test_the_rank_that_reads_is_named_and_not_those_that_wait_for_it() -> None:
    sentence = verdict({0: FINE, 1: READS}, HEARD, limit=25.0)
    assert sentence
    assert sentence.startswith("rank 1 on b has stalled: reading step 7 for 41 s (s.tar: k7, for 40 s)")


def test_a_rank_that_reads_is_named_before_those_that_compute() -> None:
    computes = replace(READS, phase=COMPUTING, seconds=60.0)
    sentence = verdict({0: computes, 1: READS}, HEARD, limit=25.0)
    assert sentence is not None
    assert "rank 0" not in sentence


def test_ranks_that_compute_may_wait_for_each_other_so_all_are_named() -> None:
    computes = replace(READS, phase=COMPUTING)
    sentence = verdict({0: computes, 1: computes}, HEARD, limit=25.0)
    assert sentence is not None
    assert "rank 0 on b" in sentence
    assert "rank 1 on b" in sentence


def test_a_silent_rank_is_named() -> None:
    sentence = verdict({0: FINE, 1: FINE}, {0: 1.0, 1: 26.0}, limit=25.0)
    assert sentence is not None
    assert sentence.startswith("rank 1 on a has not been heard for 26 s")


def test_ranks_that_compute_are_not_blamed_while_another_one_is_silent() -> None:
    computes = replace(READS, phase=COMPUTING)
    beats = {0: computes, 1: FINE}
    assert verdict(beats, {0: 1.0, 1: 6.0}, limit=25.0) is None
    assert (verdict(beats, {0: 1.0, 1: 26.0}, limit=25.0) or "").startswith("rank 1 on a has not been heard")
    assert (verdict(beats, HEARD, limit=25.0) or "").startswith("rank 0 on b has stalled: computing")


def test_saving_may_take_long_and_nothing_is_judged_before_the_second_step() -> None:
    assert verdict({0: FINE, 1: replace(READS, phase=SAVING)}, HEARD, limit=25.0) is None
    saves = replace(READS, phase=SAVING)
    gone = verdict({0: FINE, 1: saves}, {0: 1.0, 1: 99.0}, limit=25.0)  # its threads run while a file is written
    assert (gone or "").startswith("rank 1 on b has not been heard for 99 s")
    starts = replace(READS, limit=0.0)
    assert verdict({0: starts, 1: starts}, {0: 99.0, 1: 99.0}, limit=25.0) is None


def test_a_rank_that_cannot_reach_the_others_does_not_name_itself() -> None:
    """The store that all beats lie in stands on another machine, which is gone."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=1))
    post = _Post(client, [0])
    del store
    assert post.exchange(FINE) == {0: FINE}
    assert post.silent()[0] < 1.5


def test_a_rank_whose_cable_is_pulled_before_its_second_beat_is_known_and_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patience = timedelta(seconds=5)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=patience)

    def the_other_rank_opens_too(tensor: torch.Tensor) -> torch.Tensor:
        other = TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False, timeout=patience)
        other.set("beat/1", json.dumps(asdict(replace(FINE, number=0, host="b"))))
        return tensor

    monkeypatch.setattr(watchdog, "TCPStore", lambda *where, **how: store)
    monkeypatch.setattr(watchdog, "world_size", lambda: 2)
    monkeypatch.setattr(watchdog, "rank", lambda: 0)
    monkeypatch.setattr(watchdog, "all_reduce_sum", the_other_rank_opens_too)
    post = _Post.open(replace(FINE, number=0))
    time.sleep(0.05)
    beats = post.exchange(replace(FINE, number=1))
    silent = post.silent()
    assert {number: beat.host for number, beat in beats.items()} == {0: "a", 1: "b"}
    assert silent[1] >= 0.05 > silent[0]


def test_a_phase_may_take_ten_times_its_longest_and_computing_twice_that_of_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    watched = Watchdog(stall_seconds=0, reading=lambda: "")

    def limits(reading: float, computing: float, *, step: int) -> tuple[float, float]:
        nonlocal now
        watched.mark(READING, step=step)
        of_reading, now = watched.beat(1).limit, now + reading
        watched.mark(COMPUTING, step=step)
        of_computing, now = watched.beat(1).limit, now + computing
        return of_reading, of_computing

    assert limits(50, 97, step=1) == (0, 0)  # nothing is judged yet
    assert limits(2, 90, step=2) == (0, 194)  # a slow machine; of reading nothing is known yet
    assert limits(2, 3, step=3) == (20, 900)
