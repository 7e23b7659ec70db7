"""The processes that work ahead of a rank say what goes wrong in them, and nothing about their rank's end."""

import os
import signal
import sys

import pytest

from mmit.data import ahead


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
