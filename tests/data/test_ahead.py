"""The processes that work ahead of a rank say what goes wrong in them, and nothing about their rank's end."""

import os
import signal
import sys
import time
from contextlib import closing

import pytest
from torch.utils.data import Dataset

from mmit.data import ahead
from mmit.errors import DataError


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_whose_rank_was_killed_says_nothing_of_the_connection(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    said = serving(monkeypatch)
    monkeypatch.setattr(os, "getppid", lambda: 1)  # as in a process that has lost its parent
    sys.excepthook(type(error), error, None)
    assert said == []


def test_a_worker_reports_a_connection_that_breaks_while_its_rank_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    said = serving(monkeypatch)
    error = ConnectionResetError(104, "Connection reset by peer")
    sys.excepthook(type(error), error, None)
    assert said == [error]


def test_a_worker_reports_any_other_error_also_when_its_rank_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    said = serving(monkeypatch)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    error = ValueError("wrong")
    sys.excepthook(type(error), error, None)
    assert said == [error]


def serving(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """Make this process a worker for the length of a test; what Python would print of errors in its threads."""
    said: list[BaseException] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: said.append(error))
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    ahead._serve_the_rank(0)
    return said


class Numbers(Dataset[tuple[int, int]]):
    """Each item tells the process that made it."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, os.getpid()


def test_a_worker_that_is_killed_ends_the_work_with_a_sentence() -> None:
    """Its end comes while something is computed here."""
    with pytest.raises(
        DataError, match=r"a worker that reads data \(process \d+\) was ended by signal: Killed; .* set"
    ):
        compute_while_the_worker_is_killed()


def compute_while_the_worker_is_killed() -> None:
    with ahead.lost_workers_named(), closing(ahead.made_ahead(Numbers(), workers=1)) as numbers:
        first, worker = next(numbers)
        assert first == 0
        os.kill(worker, signal.SIGKILL)
        time.sleep(10)  # torch's handler of that signal raises here


def test_another_error_of_the_same_kind_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="shapes"), ahead.lost_workers_named():
        raise RuntimeError("shapes do not fit")
