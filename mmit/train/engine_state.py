"""The engine's state by parameter name, which any number of ranks and any ZeRO stage can continue.

DeepSpeed keeps flat pieces that depend on the stage and the number of ranks. Here each rank writes what it holds as
*pieces*: a stretch of one parameter, flattened, in fp32. A run that continues, whatever its own pieces are, looks up
the stretches that it needs. Nothing is gathered, nothing is unpickled, and the bits are the same.

    engine/rank-00003.safetensors   ``weight``, ``exp_avg``, ``exp_avg_sq``: the pieces one behind the other (1-D)
                                    metadata ``pieces``: [[name, start in the parameter, length], ...]
    engine/state.json               optimizer steps, number of elements of every parameter, number of files, and in fp16
                                    the loss scale

What is not trained is not stored: it comes from where the stage began. Persistent buffers are kept by rank 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mmit.distributed import rank, world_size
from mmit.errors import CheckpointError
from mmit.models.tensor_file import TensorFile, write_tensors
from mmit.train.pieces import (
    MOMENTS,
    WEIGHT,
    Piece,
    finish,
    is_partitioned,
    numel,
    optimizer_steps,
    pieces,
    prepare,
    trained,
)

if TYPE_CHECKING:
    from mmit.train.copies import Copies
    from mmit.train.engine import Engine

BUFFERS = "buffers.safetensors"
DESCRIPTION = "state.json"


@dataclass(frozen=True, kw_only=True)
class EngineState:
    """What one rank writes. places: name, start and length of its pieces; values: key, offset and values of each.

    buffers, description: of rank 0 only.
    """

    places: Sequence[tuple[str, int, int]]
    keys: Sequence[str]
    values: Iterable[tuple[str, int, Tensor]]
    buffers: Mapping[str, Tensor]
    description: Mapping[str, Any]

    def write(self, folder: Path) -> list[str]:
        """Write this rank's part into ``folder``; gives the names of its files. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        name = _file(rank())
        outline = {key: torch.empty(sum(size for *_, size in self.places), device="meta") for key in self.keys}
        file = TensorFile(folder / name, outline, metadata={"pieces": json.dumps(self.places)})
        try:
            for key, offset, values in self.values:
                file.put(key, values, start=offset)
            file.close()
        finally:
            file.abandon()
        if rank() != 0:
            return [name]
        write_tensors(folder / BUFFERS, self.buffers, metadata={})
        (folder / DESCRIPTION).write_text(json.dumps(self.description), encoding="utf-8")
        return [name, BUFFERS, DESCRIPTION]


def take(engine: Engine, *, copies: Copies | None) -> EngineState:
    """This rank's part of the state: a copy of it as it is now, or without ``copies`` what is read when written."""
    model, steps = engine.module, optimizer_steps(engine)
    places = _places(engine)
    keys = (WEIGHT, *MOMENTS) if steps else (WEIGHT,)
    values = _values(engine, keys)
    kept = model.state_dict(keep_vars=True).keys() if rank() == 0 else ()
    return EngineState(
        places=places,
        keys=keys,
        values=values if copies is None else [(key, at, copies.of(f"{key} {at}", value)) for key, at, value in values],
        buffers={name: buffer.detach().cpu().clone() for name, buffer in model.named_buffers() if name in kept},
        description={
            "steps": steps,
            "parameters": {name: numel(parameter) for name, parameter in trained(model)},
            "files": world_size(),
            **({} if engine.loss_scale is None else {"loss_scale": engine.loss_scale.state()}),
        },
    )


def copied_bytes(engine: Engine) -> int:
    """Memory that a copy takes in this process."""
    return sum(length for *_, length in _places(engine)) * 4 * (1 + len(MOMENTS))


def _held(engine: Engine) -> Iterator[Piece]:
    """What this rank writes: one of several that hold everything leaves it to rank 0."""
    return pieces(engine) if rank() == 0 or is_partitioned(engine) else iter(())


def _places(engine: Engine) -> list[tuple[str, int, int]]:
    return [(piece.name, piece.start, piece.length) for piece in _held(engine)]


def _values(engine: Engine, keys: Sequence[str]) -> Iterator[tuple[str, int, Tensor]]:
    offset = 0
    for piece in _held(engine):
        for key in keys:
            yield key, offset, piece.read(key).detach()
        offset += piece.length


def load(engine: Engine, folder: Path) -> None:
    """Put the state in ``folder`` into the engine, whichever ranks and ZeRO stage wrote it; every rank calls it.

    Raises CheckpointError where a file is damaged or the parameters are not those of the engine.
    """
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        steps, stored = int(description["steps"]), dict(description["parameters"])
        files = [folder / _file(number) for number in range(int(description["files"]))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / DESCRIPTION} is damaged or missing ({error})") from error
    expected = {name: numel(parameter) for name, parameter in trained(engine.module)}
    if stored != expected:
        other = sorted(name for name in stored.keys() | expected.keys() if stored.get(name) != expected.get(name))
        raise CheckpointError(
            f"{folder} holds the state of other parameters than are trained here: {', '.join(other[:3])}"
            f"{f' and {len(other) - 3} more' if len(other) > 3 else ''}"
        )
    with _Stored(files) as values, torch.no_grad():
        prepare(engine, steps)
        for piece in pieces(engine):
            for key in (WEIGHT, *MOMENTS) if steps else (WEIGHT,):
                piece.write(key, values.read(key, piece.name, piece.start, piece.length))
        finish(engine)
    if engine.loss_scale is not None and "loss_scale" in description:
        engine.loss_scale.restore(description["loss_scale"])
    _load_buffers(engine.module, folder / BUFFERS)


def _file(number: int) -> str:
    return f"rank-{number:05d}.safetensors"


class _Stored:
    """The pieces of all files, looked up by parameter name; read from memory-mapped files when asked for."""

    def __init__(self, files: list[Path]) -> None:
        self._open = ExitStack()
        self._where: dict[str, list[tuple[int, int, int, Any, Path]]] = {}
        for file in files:
            try:
                handle = self._open.enter_context(safe_open(file, framework="pt", device="cpu"))
                pieces = json.loads(handle.metadata()["pieces"])
            except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
                self._open.close()
                raise CheckpointError(f"{file} is damaged or missing ({error})") from error
            offset = 0
            for name, start, length in pieces:
                self._where.setdefault(name, []).append((start, length, offset, handle, file))
                offset += length

    def __enter__(self) -> _Stored:
        return self

    def __exit__(self, *_: object) -> None:
        self._where.clear()
        self._open.close()

    def read(self, key: str, name: str, start: int, length: int) -> Tensor:
        """The values of a stretch (length,) fp32, put together from the pieces that cover it."""
        values = torch.empty(length, dtype=torch.float32)
        found = 0
        for begin, size, offset, handle, file in self._where.get(name, []):
            first, last = max(start, begin), min(start + length, begin + size)
            if first >= last:
                continue
            try:
                stored = handle.get_slice(key)[offset + first - begin : offset + last - begin]
            except SafetensorError as error:
                raise CheckpointError(f"{file} lacks '{key}' of {name} ({error})") from error
            values[first - start : last - start] = stored
            found += last - first
        if found != length:
            raise CheckpointError(f"the state of {name} is incomplete: {found} of {length} values of '{key}'")
        return values


def _load_buffers(model: nn.Module, file: Path) -> None:
    buffers = dict(model.named_buffers())
    try:
        with safe_open(file, framework="pt", device="cpu") as stored:
            for name in stored.keys():  # noqa: SIM118 - no mapping
                buffers[name].copy_(stored.get_tensor(name))
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{file} is damaged, missing or of another model ({error})") from error
