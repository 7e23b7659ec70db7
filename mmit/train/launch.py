"""Starting the ranks: each stage of a run in its own launch over all local devices, or over CPU ranks.

The children are the same command with a rank in the environment, so that ``deepspeed`` or ``torchrun`` can start them
too.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from mmit.config import RunConfig
from mmit.distributed import logger
from mmit.errors import EXIT_INTERRUPTED, CheckpointError, ConfigError, Interrupted, TrainingError
from mmit.train.settings import check_unchanged

GRACE_SECONDS = 600.0
"""How long ranks may take to save after SIGTERM before they are killed; a second signal cuts it short. As long as a
large model takes on a slow disk, after the checkpoint that is on its way; ranks that hang are the watchdog's."""

AFTER_A_DEATH_SECONDS = 10.0
"""How long the other ranks may take to end after one died: they wait for it in a collective and will not come back."""

ERRORS_VARIABLE = "MMIT_ERRORS"


def run_stages(
    config: RunConfig, command: Sequence[str], *, stages: Sequence[str], ranks: int | None, fresh: bool
) -> None:
    """Train ``stages`` in order, skipping those that are complete.

    command: arguments of ``mmit`` without the stage, such as ``["train", "run.yaml", "seed=1"]``.
    Raises Interrupted where a stage was asked to stop, TrainingError where it failed.
    """
    for name in stages:
        if not fresh and is_complete(config, name):
            continue
        count = ranks or local_ranks(config)
        threads = config.launch.threads_per_rank or max(1, (os.cpu_count() or 1) // count)
        logger.info(
            "stage %s: %d rank%s, %d CPU thread%s each", name, count, "s"[: count > 1], threads, "s"[: threads > 1]
        )
        arguments = [*command, "--stage", name, *(["--fresh"] if fresh else [])]
        launch(arguments, ranks=count, threads=threads, stage=name)


def is_complete(config: RunConfig, name: str) -> bool:
    """True, and said in the log, where a stage has been trained with these settings. Raises ConfigError for others."""
    folder = config.stage_folder(name)
    if not (folder / "model" / "mmit.json").is_file():
        return False
    check_unchanged(_settings_of(folder / "model" / "mmit.json"), config, name, what=folder)
    logger.info("stage %s: complete, see %s (--fresh trains it again)", name, folder / "model")
    return True


def _settings_of(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))["made_from"]["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: unreadable ({error!r}); train the stage again with --fresh") from None


def local_ranks(config: RunConfig) -> int:
    """One rank for each accelerator of this machine, else as many CPU ranks as the run file says."""
    import torch

    return torch.accelerator.device_count() or config.launch.cpu_ranks


def launch(arguments: Sequence[str], *, ranks: int, threads: int, stage: str) -> None:
    """Run ``mmit`` with these arguments as so many ranks, to their end.

    Raises Interrupted where a rank was asked to stop, TrainingError where one failed.
    """
    with tempfile.TemporaryDirectory(prefix="mmit-") as notes:
        port = _free_port()
        children = [_start(arguments, r, ranks=ranks, threads=threads, notes=notes, port=port) for r in range(ranks)]
        watch = _Watch(children)
        codes = watch.wait()
        told = sorted({path.read_text(encoding="utf-8") for path in Path(notes).glob("*.error")})
    if all(code == 0 for code in codes):
        return
    if any(code == EXIT_INTERRUPTED for code in codes):
        raise Interrupted(f"stage {stage}: stopped and saved; the same command continues it")
    died = watch.first_to_fail if watch.first_to_fail is not None else 0
    if told:
        failure = TrainingError("\n".join(told))
        failure.exit_code = max(codes[died], 1)
        raise failure
    raise TrainingError(
        f"stage {stage}: rank {died} ended with {_named(codes[died])}; "
        "the same command continues from the last complete checkpoint"
    )


def _start(
    arguments: Sequence[str], number: int, *, ranks: int, threads: int, notes: str, port: int
) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(threads),
        ERRORS_VARIABLE: notes,
    }
    # a session of its own: Ctrl-C reaches this process alone, which passes it on once and in order
    return subprocess.Popen([sys.executable, "-m", "mmit", *arguments], env=environment, start_new_session=True)


class _Watch:
    """Waits for all children; passes signals on; ends the others when one died."""

    def __init__(self, children: Sequence[subprocess.Popen[bytes]]) -> None:
        self._children = children
        self._deadline: float | None = None
        self._signals = 0
        self.first_to_fail: int | None = None

    def wait(self) -> list[int]:
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while any(child.poll() is None for child in self._children):
                self._look()
                time.sleep(0.05)
            self._look()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._send(signal.SIGKILL)
        return [child.wait() for child in self._children]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._signals += 1
        self._send(signal.SIGTERM if self._signals == 1 else signal.SIGKILL)
        self._deadline = self._deadline or time.monotonic() + GRACE_SECONDS

    def _look(self) -> None:
        codes = {number: child.poll() for number, child in enumerate(self._children)}
        failed = [number for number, code in codes.items() if code not in (None, 0, EXIT_INTERRUPTED)]
        # one that was killed comes first: the others fail because of it
        failed.sort(key=lambda number: (codes[number] or 0) > 0)
        if self.first_to_fail is None and (number := next(iter(failed), None)) is not None:
            self.first_to_fail = number
            self._deadline = self._deadline or time.monotonic() + AFTER_A_DEATH_SECONDS
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        for child in self._children:
            if child.poll() is None:
                child.send_signal(number)


def _named(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def note_error(message: str) -> bool:
    """Leave a rank's error for the launching process; False where there is none to read it."""
    folder = os.environ.get(ERRORS_VARIABLE)
    if not folder:
        return False
    Path(folder, f"{os.environ.get('RANK', '0')}.error").write_text(message, encoding="utf-8")
    return True


def end_with_launcher() -> None:
    """Ask Linux for a SIGTERM when the launching process is gone, so that a killed launcher leaves no rank behind."""
    if sys.platform == "linux" and ERRORS_VARIABLE in os.environ:
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def check_stages(config: RunConfig, asked: str | None) -> list[str]:
    """The stages to train: all, or the one asked for. Raises ConfigError where it is not in the run file."""
    if asked is None:
        return list(config.stages)
    if asked not in config.stages:
        raise ConfigError(f"--stage {asked}: the run file has the stages {', '.join(config.stages)}")
    return [asked]
