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
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmit.distributed import rank, world_size
from mmit.errors import CheckpointError
from mmit.train.pieces import MOMENTS, WEIGHT, finish, is_partitioned, numel, optimizer_steps, pieces, prepare, trained

if TYPE_CHECKING:
    from mmit.train.engine import Engine

BUFFERS = "buffers.safetensors"
DESCRIPTION = "state.json"


def save(engine: Engine, folder: Path) -> None:
    """Write this rank's part of the state into ``folder``; every rank calls it."""
    folder.mkdir(parents=True, exist_ok=True)
    model, steps = engine.module, optimizer_steps(engine)
    values = {key: [torch.empty(0)] for key in ((WEIGHT, *MOMENTS) if steps else (WEIGHT,))}
    where: list[tuple[str, int, int]] = []
    for piece in pieces(engine) if rank() == 0 or is_partitioned(engine) else ():
        where.append((piece.name, piece.start, piece.length))
        for key, read in values.items():
            read.append(piece.read(key).detach().cpu())
    tensors = {key: torch.cat(read) for key, read in values.items()}
    save_file(tensors, folder / _file(rank()), metadata={"pieces": json.dumps(where)})
    if rank() != 0:
        return
    kept = model.state_dict(keep_vars=True).keys()
    buffers = {name: buffer.detach().cpu().clone() for name, buffer in model.named_buffers() if name in kept}
    save_file(buffers, folder / BUFFERS)
    sizes = {name: numel(parameter) for name, parameter in trained(model)}
    description = {"steps": steps, "parameters": sizes, "files": world_size()}
    if engine.loss_scale is not None:
        description["loss_scale"] = engine.loss_scale.state()
    (folder / DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")


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
