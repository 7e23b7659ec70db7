"""Ways in which soak.py interrupts a run, each with what must be seen after it."""

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

import psutil
from runs import rank_processes

PATIENCE_SECONDS = 120.0
SAVED = "the same command continues it"
KILLED = "ended with SIGKILL"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is up: its launcher, the folder of its stage, the disk that this lies on, and the dice."""

    launcher: "Popen[bytes]"
    folder: Path
    disk: Path
    dice: random.Random

    def ranks(self) -> list[psutil.Process]:
        return rank_processes(self.launcher)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One way. codes: with which the launcher may end; says: one of these is in its log, where there are any.

    at_start: the run is interrupted while it loads, else at a random step. mends: called when the run has ended.
    """

    act: Callable[[Run], None]
    codes: Sequence[int]
    says: Sequence[str] = ()
    at_start: bool = False
    mends: Callable[[Run], None] | None = None


def last_step(folder: Path) -> int:
    """The last step in the log of a stage, 0 where there is none."""
    path = folder / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().split(b"\n")
    except OSError:
        return 0
    steps = [line.split(b",")[0].split(b":")[1] for line in lines if line.startswith(b'{"step"') and b"," in line]
    return int(steps[-1]) if steps else 0


def complete(folder: Path) -> list[Path]:
    """The checkpoints that have their marker, the oldest first."""
    return sorted(path.parent for path in (folder / "checkpoints").glob("step-*/COMPLETE"))


def wait_until(claim: Callable[[], bool], launcher: "Popen[bytes]") -> None:
    """Come back when ``claim`` holds, or the run has ended."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while launcher.poll() is None and not claim():
        if time.monotonic() > deadline:
            raise AssertionError(f"nothing happened for {PATIENCE_SECONDS:.0f} s")
        time.sleep(0.001)


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _kill_one(run: Run) -> None:
    _kill([run.dice.choice(run.ranks())])


def _kill_all(run: Run) -> None:
    ranks = run.ranks()
    run.launcher.kill()
    _kill(ranks)


def _kill_launcher(run: Run) -> None:
    run.launcher.kill()


def _wait_for_save(run: Run) -> None:
    checkpoints = run.folder / "checkpoints"
    wait_until(lambda: any(checkpoints.glob(".step-*.partial")), run.launcher)
    time.sleep(run.dice.uniform(0.0, 0.15))


def _kill_all_while_saving(run: Run) -> None:
    _wait_for_save(run)
    _kill_all(run)


def _kill_one_while_saving(run: Run) -> None:
    _wait_for_save(run)
    if ranks := run.ranks():
        _kill([run.dice.choice(ranks)])


def _signal(number: int, *, times: int = 1) -> Callable[[Run], None]:
    def act(run: Run) -> None:
        for _ in range(times):
            if run.launcher.poll() is None:
                run.launcher.send_signal(number)
            time.sleep(0.1 if times > 1 else 0.0)

    return act


def _sigterm_while_saving(run: Run) -> None:
    _wait_for_save(run)
    run.launcher.send_signal(signal.SIGTERM)


def _fill_disk(run: Run) -> None:
    left = run.dice.choice((0, 4096, 65536, 400_000))
    with _ballast(run).open("wb") as file:
        while (room := os.statvfs(run.disk).f_bavail * os.statvfs(run.disk).f_frsize - left) > 0:
            with suppress(OSError):  # the run has taken some of it meanwhile
                os.posix_fallocate(file.fileno(), file.tell(), room)
                file.seek(room, os.SEEK_CUR)


def _empty_disk(run: Run) -> None:
    _ballast(run).unlink()


def _ballast(run: Run) -> Path:
    return run.disk / "ballast"


def _damage(run: Run) -> None:
    """Truncate, flip or remove something in the newest of several checkpoints, once nothing runs."""
    found = complete(run.folder)
    if len(found) < 2:
        return
    files = sorted(path for path in found[-1].rglob("*") if path.is_file() and path.name != "COMPLETE")
    file = run.dice.choice(files)
    content = bytearray(file.read_bytes())
    how = run.dice.choice(("truncate", "flip", "remove"))
    if how == "flip" and content:
        content[run.dice.randrange(len(content))] ^= 1 << run.dice.randrange(8)
        file.write_bytes(content)
    elif how == "truncate" and content:
        file.write_bytes(content[: run.dice.randrange(len(content))])
    else:
        file.unlink()


NO_ROOM = ("the disk is full", "No space left on device")

KINDS = {
    "kill -9 of one rank": Kind(act=_kill_one, codes=(1,), says=(KILLED,)),
    "kill -9 of all": Kind(act=_kill_all, codes=(-9,)),
    "kill -9 of the launcher": Kind(act=_kill_launcher, codes=(-9,)),
    "kill -9 of all during a save": Kind(act=_kill_all_while_saving, codes=(-9,)),
    "kill -9 of one rank during a save": Kind(act=_kill_one_while_saving, codes=(1,), says=(KILLED,)),
    "kill -9 of all while starting": Kind(act=_kill_all, codes=(-9,), at_start=True),
    "SIGTERM": Kind(act=_signal(signal.SIGTERM), codes=(75,), says=(SAVED,)),
    "SIGTERM during a save": Kind(act=_sigterm_while_saving, codes=(75,), says=(SAVED,)),
    "Ctrl-C": Kind(act=_signal(signal.SIGINT), codes=(75,), says=(SAVED,)),
    "Ctrl-C twice": Kind(act=_signal(signal.SIGINT, times=2), codes=(1, 75)),
    "a damaged checkpoint": Kind(act=_kill_all, codes=(-9,), mends=_damage),
    "a full disk": Kind(act=_fill_disk, codes=(1, 2), says=NO_ROOM, mends=_empty_disk),
}
