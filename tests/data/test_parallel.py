"""Work in processes: complete, stopped by the first failure, and never orphaned."""

import os
import signal

import pytest

from mmit.data.parallel import run
from mmit.errors import DataError


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_every_task_is_done_once(processes: int) -> None:
    assert sorted(run(lambda n: n * n, range(23), processes=processes)) == [n * n for n in range(23)]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_users_error_arrives_as_it_was_raised(processes: int) -> None:
    def work(task: int) -> int:
        if task == 3:
            raise DataError("record 3 is wrong")
        return task

    with pytest.raises(DataError, match=r"^record 3 is wrong$"):
        list(run(work, range(100), processes=processes))


def test_our_own_error_arrives_with_its_traceback() -> None:
    def work(task: int) -> float:
        return 1 / task

    with pytest.raises(RuntimeError, match=r"in a worker process:[\s\S]*ZeroDivisionError"):
        list(run(work, [1, 0, 1], processes=2))


def test_a_killed_worker_is_named_and_nobody_waits_for_it() -> None:
    def work(task: int) -> int:
        if task == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return task

    with pytest.raises(DataError, match="a worker process ended with code -9"):
        list(run(work, range(10), processes=2))
