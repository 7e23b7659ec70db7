"""Where the record of a stage also goes: TensorBoard, Weights & Biases, trackio; on rank 0 alone.

What a sink gets stands in the stage's folder too. One that fails is left out from then on, and said so: a network that
is down ends no training. A run that goes on writes to the run of before, whose name is kept in ``tracking.txt``.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from mmit.config import Log, Trackio, WandB
from mmit.distributed import logger
from mmit.errors import MissingExtra
from mmit.train.records import AnswerRecord

TRACKING = "tracking.txt"


class Sink(Protocol):
    """Takes numbers by name and answers with their pictures, by step (1-based)."""

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of a step."""

    def show(self, answers: Sequence[AnswerRecord], folder: Path) -> None:
        """Answers of one step; their pictures lie in ``folder``."""

    def close(self) -> None:
        """Send what is left."""


class Sinks:
    """All sinks of a stage as one. sinks: what makes each, by the key of the run file that asks for it."""

    def __init__(self, sinks: Mapping[str, Callable[[], Sink]]) -> None:
        self._sinks: dict[str, Sink] = {}
        for name, make in sinks.items():
            with self._surviving(name):
                self._sinks[name] = make()

    def write(self, values: Mapping[str, float], step: int) -> None:
        """To every sink that still works."""
        for name, sink in list(self._sinks.items()):
            with self._surviving(name):
                sink.write(values, step)

    def show(self, answers: Sequence[AnswerRecord], folder: Path) -> None:
        """To every sink that still works."""
        for name, sink in list(self._sinks.items()):
            with self._surviving(name):
                sink.show(answers, folder)

    def close(self) -> None:
        """Every sink that still works."""
        for name, sink in list(self._sinks.items()):
            with self._surviving(name):
                sink.close()

    @contextmanager
    def _surviving(self, name: str) -> Generator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever a client of a network raises: training needs no sink
            told = " ".join(str(error).split())[:200] or type(error).__name__
            logger.warning("%s: %s; training goes on without it", name, told)
            self._sinks.pop(name, None)


def check_sinks(log: Log) -> None:
    """Raise MissingExtra where a package is asked for that is not installed."""
    asked = {"tensorboard": log.tensorboard, "wandb": log.wandb, "trackio": log.trackio}
    extras = {"tensorboard": "track"}
    for package in (name for name, wanted in asked.items() if wanted):
        if find_spec(package) is None:
            raise MissingExtra(package, extras.get(package, package), f"log.{package}")


def open_sinks(log: Log, folder: Path, *, title: str, config: Mapping[str, Any], resume_step: int) -> Sinks:
    """The sinks that a stage asks for. title: what its run is called there. config: is shown beside it."""
    asked: dict[str, Callable[[], Sink]] = {}
    if log.tensorboard:
        asked["log.tensorboard"] = lambda: _TensorBoard(folder / "tensorboard", resume_step)
    key = _key(folder) if log.wandb or log.trackio else ""
    if (wandb := log.wandb) is not None:
        asked["log.wandb"] = lambda: _WandB(wandb, folder, title, key, config)
    if (trackio := log.trackio) is not None:
        asked["log.trackio"] = lambda: _Trackio(trackio, f"{title}-{key}", config)
    return Sinks(asked)


def _key(folder: Path) -> str:
    """Names the runs of a stage elsewhere; the same whenever it goes on."""
    path = folder / TRACKING
    if path.exists() and (kept := path.read_text(encoding="utf-8").strip()).isalnum():
        return kept
    key = secrets.token_hex(4)
    path.write_text(key, encoding="utf-8")
    return key


class _TensorBoard:
    def __init__(self, folder: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def write(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def show(self, answers: Sequence[AnswerRecord], folder: Path) -> None:
        import numpy as np
        from PIL import Image

        for one in answers:
            self._writer.add_text(f"answers/{one.id}", _caption(one), one.step)
            for name in one.pictures:
                with Image.open(folder / name) as picture:
                    self._writer.add_image(f"answers/{one.id}", np.asarray(picture), one.step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, asked: WandB, folder: Path, title: str, key: str, config: Mapping[str, Any]) -> None:
        self._package: Any = import_module("wandb")
        self._run: Any = self._package.init(
            project=asked.project,
            entity=asked.entity or None,
            name=title,
            id=key,
            resume="allow",
            mode=asked.mode,
            dir=str(folder),
            config=dict(config),
        )
        # steps that are done again after a kill are older than the last one sent, which its own counter would refuse
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def show(self, answers: Sequence[AnswerRecord], folder: Path) -> None:
        shown = [
            self._package.Image(str(folder / name), caption=_caption(one)) for one in answers for name in one.pictures
        ]
        if shown:
            self._run.log({"answers": shown, "step": answers[0].step})

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, asked: Trackio, name: str, config: Mapping[str, Any]) -> None:
        self._package: Any = import_module("trackio")
        self._run: Any = self._package.init(
            project=asked.project,
            name=name,
            space_id=asked.space or None,
            config=dict(config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def write(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def show(self, answers: Sequence[AnswerRecord], folder: Path) -> None:
        for one in answers:
            if one.pictures:
                picture = self._package.Image(str(folder / one.pictures[0]), caption=_caption(one))
                self._run.log({f"answers/{one.id}": picture}, step=one.step)

    def close(self) -> None:
        self._package.finish()


def _caption(one: AnswerRecord) -> str:
    return f"{one.question}\n\nreference: {one.reference}\n\nanswer: {one.answer}"
