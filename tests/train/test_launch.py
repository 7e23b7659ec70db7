"""Starting ranks, and what is said when one of them ends badly."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmit.errors import EXIT_INTERRUPTED
from mmit.train.launch import _Watch


def child(code: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True)


def test_all_codes_are_told_when_all_end_well() -> None:
    watch = _Watch([child("pass"), child("pass")])
    assert watch.wait() == [0, 0]
    assert watch.first_to_fail is None


def test_the_others_are_ended_when_one_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmit.train.launch.AFTER_A_DEATH_SECONDS", 0.2)
    watch = _Watch(
        [child("import time; time.sleep(60)"), child("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")]
    )
    started = time.monotonic()
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
        "print(_Watch(children).wait(), flush=True)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert [parent.stdout.readline().strip() for _ in range(2)] == ["ready", "ready"]
    os.kill(parent.pid, signal.SIGINT)
    out, _ = parent.communicate(timeout=30)
    assert out.strip() == str([EXIT_INTERRUPTED, EXIT_INTERRUPTED])
