"""Starting ranks, and what is said when one of them ends badly."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mmit.errors import EXIT_INTERRUPTED, Interrupted, MmitError, TrainingError
from mmit.train import launch as launching
from mmit.train.launch import _Watch, launch
from mmit.train.lifeline import VARIABLE, Lifeline, end_with_launcher, note_error


def child(code: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True)


def test_all_codes_are_told_when_all_end_well() -> None:
    with _Watch([child("pass"), child("pass")]) as watch:
        assert watch.wait() == [0, 0]
    assert watch.first_to_fail is None


def test_the_others_are_ended_when_one_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmit.train.launch.AFTER_A_DEATH_SECONDS", 0.2)
    children = [child("import time; time.sleep(60)"), child("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")]
    started = time.monotonic()
    with _Watch(children) as watch:
        assert watch.wait() == [-signal.SIGKILL, -signal.SIGKILL]
    assert watch.first_to_fail == 1
    assert time.monotonic() - started < 20


def test_a_signal_is_passed_on_once_and_the_children_may_finish(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import subprocess, sys\n"
        "from mmit.train.launch import _Watch\n"
        'code = "import os, signal, sys, time\\n"\n'
        'code += "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\\n"\n'
        "code += \"os.write(1, b'ready\\\\n')\\ntime.sleep(60)\"\n"
        "children = [subprocess.Popen([sys.executable, '-c', code], start_new_session=True) for _ in range(2)]\n"
        "with _Watch(children) as watch:\n"
        "    print(watch.wait(), flush=True)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert [parent.stdout.readline().strip() for _ in range(2)] == ["ready", "ready"]
    os.kill(parent.pid, signal.SIGINT)
    out, _ = parent.communicate(timeout=30)
    assert out.strip() == str([EXIT_INTERRUPTED, EXIT_INTERRUPTED])


STARTED = "open(sys.argv[3] + os.environ['RANK'], 'w').close()"
SLEEPS = f"{STARTED}; time.sleep(60)"
SAVES = f"signal.signal(signal.SIGTERM, lambda *_: (note_error('saved at step 3'), os._exit(75))); {SLEEPS}"
HANGS = f"signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEPS}"


@pytest.mark.parametrize(
    ("code", "signals", "said"),
    [
        pytest.param(
            f"os.environ['RANK'] == '1' and signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEPS}",
            1,
            Interrupted("stage a: was stopped; (next time)"),
            id="at start, where another rank waits for it",
        ),
        pytest.param(SLEEPS, 1, Interrupted("stage a: was stopped; (next time)"), id="at start"),
        pytest.param(SAVES, 1, Interrupted("saved at step 3"), id="saved"),
        pytest.param(
            HANGS,
            2,
            TrainingError("stage a: ended at the second signal, without saving; (next time)"),
            id="the second signal",
        ),
        pytest.param(
            f"{STARTED}; os.kill(os.getpid(), signal.SIGKILL) if os.environ['RANK'] == '1' else time.sleep(60)",
            0,
            TrainingError("stage a: rank 1 ended with SIGKILL; (next time)"),
            id="killed",
        ),
        pytest.param(
            f"{STARTED}; note_error('no data here'); os._exit(2)", 0, TrainingError("no data here"), id="refused"
        ),
    ],
)
def test_the_end_of_a_launch_is_told_in_one_sentence(
    code: str, signals: int, said: MmitError, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ranks that are small programs, and a launcher that is asked to stop so many times when all of them run."""
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\nimport os, signal, sys, time\nfrom mmit.train.lifeline import note_error\n{code}\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr(launching.sys, "executable", str(python))
    monkeypatch.setattr(launching, "AFTER_A_DEATH_SECONDS", 0.2)
    asking = threading.Thread(target=ask_to_stop, args=(tmp_path, signals))
    asking.start()
    with pytest.raises(type(said)) as error:
        launch([str(tmp_path / "rank-")], ranks=2, threads=1, stage="a", next_time=lambda: "(next time)")
    asking.join()
    assert str(error.value) == str(said)


def ask_to_stop(folder: Path, times: int) -> None:
    deadline = time.monotonic() + 30
    while len(list(folder.glob("rank-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    for _ in range(times):
        time.sleep(0.2)  # two at once would be one to the kernel
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_rank_speaks_for_itself_when_its_launcher_is_gone_and_does_not_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = Lifeline()
    own = os.dup(line.end)
    monkeypatch.setenv(VARIABLE, str(own))
    assert note_error("one")
    assert line.told() == "one"
    line.close()  # as the kernel does it for a launcher that is killed
    assert not note_error("two")
    assert ended_with(end_with_launcher) == EXIT_INTERRUPTED
    os.close(own)


def ended_with(action: Callable[[], None]) -> int:
    """The exit code of a process of its own that does ``action``, 0 where it comes back."""
    process = os.fork()
    if not process:
        code = 0
        try:
            action()
        except SystemExit as ended:
            code = int(ended.code or 0)
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
