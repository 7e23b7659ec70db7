"""The checkpoints of a running stage: a copy is taken in the step, and goes to disk while the next steps run.

    main thread       copy of weights and moments | the next steps ...                           | was it written?
    writer of a rank    its own files, then a note that lists them
    writer of rank 0    the model, and once all notes are there: files.json, COMPLETE, the name; old ones are removed

Writers use no collective: the notes of all ranks lie in the folder itself. One checkpoint is on its way at a time. What
fails there asks the loop to stop, and is told by ``finish``. Where memory does not allow a copy, all is written in the
step, one tensor at a time.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from mmit.config import Save
from mmit.distributed import logger, rank, world_size
from mmit.errors import CheckpointError, OtherRankFailed
from mmit.train import engine_state
from mmit.train.checkpoint import FILES, RunState, collectively, crc_of
from mmit.train.copies import Copies
from mmit.train.engine import Engine
from mmit.train.host_memory import copies_fit
from mmit.train.model_writer import HeldModel, ModelWriter
from mmit.train.stage_folder import MARKER, complete, newest, step_of

POLL_SECONDS = 0.05
CLOSING_SECONDS = 60.0
NOTES_SECONDS = 5.0
"""How long a run that ends with an error waits for its own files, and then for the notes of the other ranks."""


@dataclass(frozen=True, kw_only=True)
class _Held:
    """What is written: of the moment it was taken where it is a copy, else of the moment it is written."""

    state: RunState
    engine: engine_state.EngineState
    model: HeldModel
    partial: Path
    final: Path
    best: int | None


@dataclass(frozen=True, kw_only=True)
class _OnItsWay:
    """A checkpoint that the writer works at. own: this rank's files; published: on rank 0, the whole."""

    partial: Path
    final: Path
    own: Future[None]
    published: Future[None]


class Saver:
    """Writes the checkpoints of one stage below ``folder``; every call is collective but ``close``.

    background: whether a copy is taken, and written while training goes on. on_failure: called by the writer.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        model: ModelWriter,
        *,
        keep_last: int,
        background: bool,
        on_failure: Callable[[], None],
    ) -> None:
        self._folder, self._engine, self._model = folder, engine, model
        self._keep_last, self._background, self._on_failure = keep_last, background, on_failure
        self._copies = Copies()
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._abandoned = threading.Event()
        self._on_its_way: _OnItsWay | None = None
        self._taken = -1

    def save(self, state: RunState, *, in_step: bool = False, best: int | None = None) -> None:
        """Take a checkpoint, once for each step; with ``in_step`` it is on disk afterwards. best: a step that is kept.

        Raises CheckpointError where this one or the one before could not be written; what was complete before stays.
        """
        self.finish()
        if state.step == self._taken:
            return
        self._taken = state.step
        name = f"step-{state.step:06d}"
        partial, final = self._folder / f".{name}.partial", self._folder / name
        copies = self._copies if self._background and not in_step else None
        with self._told(partial):
            collectively(lambda: _make_empty(partial), what=partial)
            held = _Held(
                state=state,
                engine=engine_state.take(self._engine, copies=copies),
                model=self._model.take(copies=copies),
                partial=partial,
                final=final,
                best=best,
            )
            if copies is None:
                collectively(lambda: _write_own(held), what=partial)
                collectively(lambda: self._publish(held), what=final)
                return
        own = self._writer.submit(_write_own, held)
        published = self._writer.submit(self._publish_when_all_wrote, held, own)
        for future in (own, published):
            future.add_done_callback(lambda done: self._on_failure() if done.exception() else None)
        self._on_its_way = _OnItsWay(partial=partial, final=final, own=own, published=published)

    def finish(self) -> None:
        """Wait for the checkpoint that is on its way. Raises CheckpointError where a rank could not write it."""
        if (way := self._on_its_way) is None:
            return
        self._on_its_way = None
        with self._told(way.partial):
            try:
                collectively(way.own.result, what=way.partial)
            except (CheckpointError, OtherRankFailed):
                self._abandoned.set()
                wait([way.published])
                raise
            collectively(way.published.result, what=way.final)

    def write_model(self, directory: Path) -> None:
        """Write the model as it is now, and come back when it is on disk. Raises CheckpointError."""
        held = self._model.take(copies=None)
        collectively(lambda: held.write(directory, directory), what=directory)

    def close(self) -> None:
        """Let the checkpoint that is on its way reach the disk, whatever ends the run; not collective."""
        if (way := self._on_its_way) is not None:
            wait([way.own], timeout=CLOSING_SECONDS)
            wait([way.published], timeout=NOTES_SECONDS)  # another rank may be gone, and its note never come
        self._abandoned.set()
        self._writer.shutdown(wait=False)

    def _publish_when_all_wrote(self, held: _Held, own: Future[None]) -> None:
        """In the writer, after its own files: rank 0 waits for the notes of the others."""
        if rank() != 0 or own.exception() is not None:
            return
        while not all(_note(held.partial, number).is_file() for number in range(world_size())):
            if self._abandoned.wait(POLL_SECONDS):
                return
        self._publish(held)

    def _publish(self, held: _Held) -> None:
        """Give the checkpoint its marker and its name, and remove the oldest ones."""
        if rank() != 0:
            return
        partial, final = held.partial, held.final
        files: dict[str, list[int]] = {}
        for number in range(world_size()):
            files |= json.loads(_note(partial, number).read_text(encoding="utf-8"))
            _note(partial, number).unlink()
        (partial / FILES).write_text(json.dumps(files, indent=1), encoding="utf-8")
        _to_disk(partial / FILES)
        (partial / MARKER).write_text("all files of this checkpoint are written\n", encoding="utf-8")
        _to_disk(partial / MARKER)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _to_disk(self._folder)
        for path in (old for old in complete(self._folder)[: -self._keep_last] if step_of(old) != held.best):
            (path / MARKER).unlink()  # first, so that a half-removed folder is not taken for a checkpoint
            shutil.rmtree(path)
        for path in self._folder.glob(".step-*.partial"):
            shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def _told(self, partial: Path) -> Generator[None]:
        """Say of a failure inside what is left, and leave nothing half-written."""
        try:
            yield
        except (CheckpointError, OtherRankFailed) as error:
            if rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OtherRankFailed):
                raise
            before = newest(self._folder)
            kept = f"{before} is still complete" if before else "there is no earlier checkpoint"
            raise CheckpointError(
                f"the checkpoint was not written: {error}; {kept}; mend this and run the same command"
            ) from None


def make_saver(
    folder: Path, engine: Engine, model: ModelWriter, asked: Save, *, on_failure: Callable[[], None]
) -> Saver:
    """What writes the checkpoints of a stage, in the background where asked for or where memory allows; collective."""
    background = asked.background
    if background == "auto":
        needed = engine_state.copied_bytes(engine) + model.copied_bytes()
        background = copies_fit(needed)
        where = "while training goes on, from a copy of" if background else "in the step: memory is short for a copy of"
        logger.info("checkpoints are written %s %.2f GB on this rank", where, needed / 1e9)
    return Saver(folder, engine, model, keep_last=asked.keep_last, background=background, on_failure=on_failure)


def _make_empty(partial: Path) -> None:
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)


def _write_own(held: _Held) -> None:
    """The files of this rank, and the note that lists them with size and CRC-32."""
    partial = held.partial
    held.model.write(partial / "model", held.final / "model")
    mine = [partial / "engine" / name for name in held.engine.write(partial / "engine")]
    if rank() == 0:
        (partial / "state.json").write_text(json.dumps(asdict(held.state), indent=1), encoding="utf-8")
        mine += [partial / "state.json", *(path for path in sorted((partial / "model").rglob("*")) if path.is_file())]
    for path in mine:
        _to_disk(path)
    written = {str(path.relative_to(partial)): [path.stat().st_size, crc_of(path)] for path in mine}
    half = _note(partial, rank()).with_suffix(".half")
    half.write_text(json.dumps(written), encoding="utf-8")
    os.replace(half, _note(partial, rank()))


def _note(partial: Path, number: int) -> Path:
    return partial / f"written-{number:05d}.json"


def _to_disk(path: Path) -> None:
    """Wait until the disk has a file or a folder, so that the marker is never there before what it speaks of."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
