"""The demo's parts: encoder and language model, made side by side on two cores and kept for the next time."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import queue
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from mmit.demo.clip import CONFIG_FILE, LAYER, WEIGHTS_FILE, ClipSettings, train_clip
from mmit.demo.language import LanguageSettings, make_tokenizer, train_language_model
from mmit.demo.world import World
from mmit.errors import TrainingError

_SOURCES = ("world.py", "clip.py", "language.py", "muon.py")
_DONE = "made.json"


@dataclass(frozen=True)
class Parts:
    """Where the parts are, as the ``model`` section of a run file names them."""

    folder: Path

    @property
    def encoder(self) -> dict[str, Any]:
        """The ``encoder`` section."""
        return {
            "type": "open_clip",
            "name": str(self.folder / "clip" / CONFIG_FILE),
            "pretrained": str(self.folder / "clip" / WEIGHTS_FILE),
            "layer": LAYER,
            "resize": "squash",
        }

    @property
    def language_model(self) -> Path:
        """The directory of the language model."""
        return self.folder / "language_model"


def make_parts(
    folder: Path,
    world: World,
    clip: ClipSettings,
    language: LanguageSettings,
    *,
    on_step: Callable[[str, int, float], None],
) -> Parts:
    """Train both parts below ``folder`` unless the same ones are there; the same means the same code and settings.

    on_step: called with ``clip`` or ``language_model``, the number of the step, and its loss. Raises TrainingError.
    """
    wanted = _fingerprint(world, clip, language)
    if (folder / _DONE).is_file() and json.loads((folder / _DONE).read_text())["fingerprint"] == wanted:
        return Parts(folder)
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("clip", "language_model"):
        (folder / name).mkdir(parents=True)
    make_tokenizer(world, language, folder / "language_model")
    context = multiprocessing.get_context("spawn")
    told: Queue[tuple[str, int, float]] = context.Queue()
    workers = {
        "clip": context.Process(target=_make_clip, args=(world, clip, folder, told), daemon=True),
        "language_model": context.Process(
            target=_make_language_model, args=(world, language, folder, told), daemon=True
        ),
    }
    for worker in workers.values():
        worker.start()
    try:
        while any(worker.is_alive() for worker in workers.values()) or not told.empty():
            try:
                on_step(*told.get(timeout=0.2))
            except queue.Empty:
                continue
    finally:
        for worker in workers.values():
            worker.kill()
    for name, worker in workers.items():
        worker.join()
        if worker.exitcode != 0:
            raise TrainingError(f"{folder / name}: making this part ended with exit code {worker.exitcode}")
    (folder / _DONE).write_text(json.dumps({"fingerprint": wanted}), encoding="utf-8")
    return Parts(folder)


def _make_clip(world: World, settings: ClipSettings, folder: Path, told: Queue[tuple[str, int, float]]) -> None:
    _prepare_process()
    tokenizer = _tokenizer(folder)
    train_clip(world, tokenizer, settings, folder / "clip", on_step=lambda n, loss: told.put(("clip", n, loss)))


def _make_language_model(
    world: World, settings: LanguageSettings, folder: Path, told: Queue[tuple[str, int, float]]
) -> None:
    _prepare_process()
    train_language_model(
        world,
        _tokenizer(folder),
        settings,
        folder / "language_model",
        on_step=lambda n, loss: told.put(("language_model", n, loss)),
    )


def _prepare_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    torch.set_num_threads(1)  # one core each: two threads on two busy cores are slower than one
    # the bar of the demo is all that is shown: open_clip warns of random weights, transformers shows bars
    logging.getLogger().setLevel(logging.ERROR)
    disable_progress_bar()
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _tokenizer(folder: Path) -> Any:  # noqa: ANN401  (a transformers tokenizer)
    from mmit.tokenizer import load_tokenizer

    return load_tokenizer(str(folder / "language_model"))


def _fingerprint(world: World, clip: ClipSettings, language: LanguageSettings) -> str:
    here = Path(__file__).parent
    code = "".join((here / name).read_text(encoding="utf-8") for name in _SOURCES)
    settings = json.dumps([asdict(clip), asdict(language), _plain(asdict(world))], sort_keys=True)
    return hashlib.sha256(f"{code}{settings}{torch.__version__}{os.uname().machine}".encode()).hexdigest()


def _plain(value: Any) -> Any:  # noqa: ANN401  (a tree of settings)
    if isinstance(value, dict):
        return {key: _plain(below) for key, below in value.items()}
    return sorted(value) if isinstance(value, frozenset | set) else value
