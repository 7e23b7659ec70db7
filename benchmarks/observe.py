"""Watches a training from outside: CPU time, wall clock and memory of all its processes between two of its steps.

Every system is measured by the same eyes: it only has to append a line to a file after each step. Linux only (/proc).
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 0.005
TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Span:
    """What the processes of a training used between two steps; peak_bytes from their start, summed over them."""

    cpu_seconds: float
    seconds: float
    peak_bytes: int


class RunError(RuntimeError):
    """A training ended before its last step."""


def watch(
    commands: Sequence[tuple[Sequence[str], Mapping[str, str]]], *, progress: Path, first: int, last: int, log: Path
) -> Span:
    """Run commands side by side, each with additions to its environment, and measure from step ``first`` to ``last``.

    progress: the file that holds one line for each step done. Raises RunError.
    """
    children: list[subprocess.Popen[bytes]] = []
    with log.open("wb") as out:
        try:
            for command, more in commands:
                environment = {**os.environ, **more}
                children.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
            started, cpu_before, _ = _at_line(first, progress, children, log)
            ended, cpu_after, peak = _at_line(last, progress, children, log)
            codes = [child.wait() for child in children]
        finally:
            for child in children:
                child.kill()
                child.wait()
    if any(codes):
        raise RunError(f"ended with {codes}:\n{_tail(log)}")
    return Span(cpu_seconds=cpu_after - cpu_before, seconds=ended - started, peak_bytes=peak)


def _at_line(
    wanted: int, progress: Path, children: Sequence[subprocess.Popen[bytes]], log: Path
) -> tuple[float, float, int]:
    """Clock, CPU seconds and summed peak memory at the moment when ``progress`` has its ``wanted``-th line."""
    while True:
        if progress.exists() and progress.read_bytes().count(b"\n") >= wanted:
            everyone = [pid for child in children for pid in _family(child.pid)]
            cpu = sum(_cpu_seconds(pid) for pid in everyone)
            return time.perf_counter(), cpu, sum(_peak_bytes(pid) for pid in everyone)
        if any(child.poll() for child in children) or all(child.poll() == 0 for child in children):
            raise RunError(f"ended before step {wanted}:\n{_tail(log)}")
        time.sleep(POLL_SECONDS)


def _family(pid: int) -> Iterator[int]:
    yield pid
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in _read(thread).split():
            yield from _family(int(child))


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process and of its children that have ended."""
    stat = _read(Path(f"/proc/{pid}/stat"))
    # field 2 is the command in brackets and may hold anything; utime, stime, cutime, cstime are fields 14 to 17
    return sum(int(ticks) for ticks in stat.rpartition(")")[2].split()[11:15]) / TICK


def _peak_bytes(pid: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", _read(Path(f"/proc/{pid}/status")))
    return int(found[1]) * 1024 if found else 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""  # it has ended since


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:])
