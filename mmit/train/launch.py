"""Starting the ranks: each stage of a run in its own launch over all local devices, or over CPU ranks.

The children are the same command with a rank in the environment, so that ``deepspeed`` or ``torchrun`` can start them
too.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from mmit.config import RunConfig, Stage
from mmit.distributed import logger
from mmit.errors import EXIT_INTERRUPTED, CheckpointError, ConfigError, Interrupted, TrainingError
from mmit.train.lifeline import VARIABLE, Lifeline
from mmit.train.settings import check_unchanged
from mmit.train.stage_folder import check_output, newest

GRACE_SECONDS = 600.0
"""How long ranks may take to save after SIGTERM before they are killed; a second signal cuts it short. As long as a
large model takes on a slow disk, after the checkpoint that is on its way; ranks that hang are the watchdog's."""

AFTER_A_DEATH_SECONDS = 10.0
"""How long the other ranks may take to end after one died: they wait for it in a collective and will not come back."""


def run_stages(
    config: RunConfig, command: Sequence[str], *, stages: Sequence[str], ranks: int | None, fresh: bool
) -> None:
    """Train ``stages`` in order, skipping those that are complete.

    command: arguments of ``mmit`` without the stage, such as ``["train", "run.yaml", "seed=1"]``.
    Raises ConfigError for what no rank could mend, Interrupted where a stage was asked to stop, TrainingError where it
    failed.
    """
    for name in stages:
        if not fresh and is_complete(config, name):
            continue
        check_output(config.folder)
        count = ranks or local_ranks(config)
        check_ranks(config.stages[name], name, count)
        threads = config.launch.threads_per_rank or max(1, (os.cpu_count() or 1) // count)
        logger.info(
            "stage %s: %d rank%s, %d CPU thread%s each", name, count, "s"[: count > 1], threads, "s"[: threads > 1]
        )
        arguments = [*command, "--stage", name, *(["--fresh"] if fresh else [])]
        checkpoints = config.stage_folder(name) / "checkpoints"
        launch(arguments, ranks=count, threads=threads, stage=name, next_time=lambda at=checkpoints: _next_time(at))


def _next_time(checkpoints: Path) -> str:
    found = newest(checkpoints)
    return "the same command starts again" if found is None else f"the same command continues from {found}"


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


def check_ranks(stage: Stage, name: str, ranks: int) -> None:
    """Raise ConfigError where so many ranks cannot share rows as a stage asks."""
    size = stage.parallel.sequence
    if ranks % size:
        raise ConfigError(
            f"stages.{name}.parallel.sequence: {size} does not divide the {ranks} rank{'s'[: ranks > 1]}; set it to 1, "
            f"or start a multiple of {size} ranks (--ranks, launch.cpu_ranks)"
        )


def launch(arguments: Sequence[str], *, ranks: int, threads: int, stage: str, next_time: Callable[[], str]) -> None:
    """Run ``mmit`` with these arguments as so many ranks, to their end.

    next_time: says what the same command will do, once the ranks are gone.
    Raises Interrupted where they were asked to stop and did, TrainingError where one failed.
    """
    children: list[subprocess.Popen[bytes]] = []
    with ExitStack() as pipes, _Watch(children) as watch:
        lines = [pipes.enter_context(closing(Lifeline())) for _ in range(ranks)]
        where = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": str(threads)}
        where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        for number, line in enumerate(lines):
            if not watch.signals:
                children.append(_start(arguments, number, where, line))
        codes = watch.wait()
        told = "\n".join(sorted({said for line in lines if (said := line.told())}))
    if len(codes) == ranks and all(code == 0 for code in codes):
        return
    stopped = f"stage {stage}: was stopped; {next_time()}"
    if any(code == EXIT_INTERRUPTED for code in codes):
        raise Interrupted(told or stopped)
    if watch.signals > 1:
        raise TrainingError(f"stage {stage}: ended at the second signal, without saving; {next_time()}")
    if watch.signals and (not codes or -signal.SIGTERM in codes):  # only a rank that starts dies of it
        raise Interrupted(stopped)
    died = watch.first_to_fail if watch.first_to_fail is not None else 0
    if told:
        failure = TrainingError(told)
        failure.exit_code = max(codes[died], 1)
        raise failure
    raise TrainingError(f"stage {stage}: rank {died} ended with {_named(codes[died])}; {next_time()}")


def _start(arguments: Sequence[str], number: int, where: Mapping[str, str], line: Lifeline) -> subprocess.Popen[bytes]:
    own = {"RANK": str(number), "LOCAL_RANK": str(number), VARIABLE: str(line.end)}
    # else a rank whose peer is gone prints the frames of torch's C++ below the sentence that says so
    own["TORCH_CPP_LOG_LEVEL"] = os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")
    # a session of its own: Ctrl-C reaches this process alone, which passes it on once and in order
    return subprocess.Popen(
        [sys.executable, "-m", "mmit", *arguments],
        env={**os.environ, **where, **own},
        pass_fds=[line.end],
        start_new_session=True,
    )


class _Watch:
    """Waits for all children; passes signals on; ends the others when one died. In force as a context manager.

    children: those that are started meanwhile may be added. signals: how many came.
    """

    def __init__(self, children: Sequence[subprocess.Popen[bytes]]) -> None:
        self._children = children
        self._deadline: float | None = None
        self.signals = 0
        self.first_to_fail: int | None = None

    def __enter__(self) -> _Watch:
        self._before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._send(signal.SIGKILL)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait(self) -> list[int]:
        """The exit codes of all children, once they have ended."""
        if self.signals:  # while the last of them was started
            self._send(signal.SIGTERM)
        while any(child.poll() is None for child in self._children):
            self._look()
            time.sleep(0.05)
        self._look()
        return [child.wait() for child in self._children]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signals += 1
        self._send(signal.SIGTERM if self.signals == 1 else signal.SIGKILL)
        self._end_within(GRACE_SECONDS)

    def _look(self) -> None:
        codes = {number: child.poll() for number, child in enumerate(self._children)}
        failed = [number for number, code in codes.items() if code not in (None, 0, EXIT_INTERRUPTED)]
        # one that was killed comes first: the others fail because of it
        failed.sort(key=lambda number: (codes[number] or 0) > 0)
        if self.first_to_fail is None and (number := next(iter(failed), None)) is not None:
            self.first_to_fail = number
            self._end_within(AFTER_A_DEATH_SECONDS)
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._send(signal.SIGKILL)

    def _end_within(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self._deadline = deadline if self._deadline is None else min(deadline, self._deadline)

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


def check_stages(config: RunConfig, asked: str | None) -> list[str]:
    """The stages to train: all, or the one asked for. Raises ConfigError where it is not in the run file."""
    if asked is None:
        return list(config.stages)
    if asked not in config.stages:
        raise ConfigError(f"--stage {asked}: the run file has the stages {', '.join(config.stages)}")
    return [asked]
