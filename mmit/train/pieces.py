"""What a rank holds of master weights and moments, as stretches of parameters, under every ZeRO stage.

DeepSpeed keeps them in flat tensors: stages 1 and 2 cut all parameters of a group, one behind the other, into equal
parts; stage 3 cuts each parameter. The functions here know where a stretch of a parameter lies; ``engine_state``
writes and reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

if TYPE_CHECKING:
    from mmit.train.engine import Engine

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of a flattened parameter that this rank holds, and how its values are read and written.

    read: gives the values of ``weight`` or a moment, (length,) fp32; write: takes them.
    """

    name: str
    start: int
    length: int
    read: Callable[[str], Tensor]
    write: Callable[[str, Tensor], object]


def optimizer_steps(engine: Engine) -> int:
    """Steps that the optimizer has made, by its own count."""
    counts = {int(state["step"]) for state in _inner(engine).state.values() if "step" in state}
    assert len(counts) <= 1, f"trained tensors disagree on the number of steps: {sorted(counts)}"
    return counts.pop() if counts else 0


def pieces(engine: Engine) -> Iterator[Piece]:
    """The stretches of trained parameters that this rank holds."""
    for name, parameter in trained(engine.module):
        if hasattr(parameter, "ds_id"):
            yield from _piece_of_zero_3(name, parameter)
        elif hasattr(parameter, "_hp_mapping"):
            yield from _piece_of_zero_1_2(name, parameter, _inner(engine))
        else:
            yield _whole(name, parameter, _inner(engine))


def _piece_of_zero_3(name: str, parameter: Any) -> Iterator[Piece]:  # noqa: ANN401  (DeepSpeed adds attributes)
    held = parameter.ds_tensor.numel()  # equal on all ranks; the last ones hold padding at their end
    start = parameter.ds_process_group.rank() * held
    length = min(held, parameter.ds_numel - start)

    def read(key: str) -> Tensor:
        value = safe_get_local_fp32_param(parameter) if key == WEIGHT else _local_moment(parameter, key)
        return value.float()[:length]

    def write(key: str, value: Tensor) -> None:
        padded = nn.functional.pad(value, (0, held - length))
        if key == WEIGHT:
            safe_set_local_fp32_param(parameter, padded)
            parameter.ds_tensor.data.copy_(padded)
        else:
            safe_set_local_optimizer_state(parameter, padded, key)

    if length > 0:
        yield Piece(name=name, start=start, length=length, read=read, write=write)


def _local_moment(parameter: nn.Parameter, key: str) -> Tensor:
    return safe_get_local_optimizer_state(parameter, key)


def _piece_of_zero_1_2(
    name: str,
    parameter: Any,  # noqa: ANN401  (DeepSpeed adds attributes)
    optimizer: torch.optim.Optimizer,
) -> Iterator[Piece]:
    held = parameter._hp_mapping
    if held is None:  # another rank's partition
        return
    place = held.hp_fragment_address

    def fragment(key: str) -> Tensor:
        # Not DeepSpeed's own look-up of moments, which knows those of the first group of parameters only.
        flat = optimizer.param_groups[held.param_group_index]["params"][0]
        whole = flat.data if key == WEIGHT else optimizer.state[flat][key]
        return whole.narrow(0, place.start, place.numel)

    yield Piece(
        name=name,
        start=held.lp_fragment_address.start,
        length=held.lp_fragment_address.numel,
        read=lambda key: fragment(key).float(),
        write=lambda key, value: fragment(key).copy_(value),
    )


def _whole(name: str, parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> Piece:
    """Stage 0 in fp32: every rank holds everything."""

    def tensor(key: str) -> Tensor:
        return (parameter.data if key == WEIGHT else optimizer.state[parameter][key]).view(-1)

    return Piece(
        name=name,
        start=0,
        length=parameter.numel(),
        read=tensor,
        write=lambda key, value: tensor(key).copy_(value),
    )


def prepare(engine: Engine, steps: int) -> None:
    """Make room for the moments, which torch and DeepSpeed create in the first step only."""
    outer: Any = engine.optimizer
    inner = _inner(engine)
    if steps:
        for flat, group in _flat_tensors(engine):
            counter = flat.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
            inner.state[flat] = {
                "step": torch.tensor(float(steps), dtype=torch.float32, device=counter),
                **{key: torch.zeros_like(flat) for key in MOMENTS},
            }
    gathered = getattr(outer, "persistent_parameters", None)
    if gathered:  # ZeRO-3 keeps small parameters whole; they are gathered anew when their pieces are in place
        gathered[0].partition(gathered)


def finish(engine: Engine) -> None:
    """Make the weights that the model computes with out of the master weights."""
    outer: Any = engine.optimizer
    if hasattr(outer, "update_lp_params"):
        outer.update_lp_params()
    gathered = getattr(outer, "persistent_parameters", None)
    if gathered:
        gathered[0].all_gather(gathered)


def _flat_tensors(engine: Engine) -> list[tuple[Tensor, Mapping[str, Any]]]:
    """The tensors that the optimizer keeps its state for, each with its group's settings."""
    outer: Any = engine.optimizer
    groups = _inner(engine).param_groups
    if engine.zero_stage == 3:
        return [(flat, groups[0]) for flat in outer.fp32_partitioned_groups_flat]
    return [(flat, group) for group in groups for flat in group["params"]]


def _inner(engine: Engine) -> torch.optim.Optimizer:
    """The optimizer that DeepSpeed wraps, or that it uses as it is."""
    outer: Any = engine.optimizer
    return getattr(outer, "optimizer", outer)


def is_partitioned(engine: Engine) -> bool:
    """False where every rank holds everything: plain fp32 under stage 0."""
    return _inner(engine) is not engine.optimizer


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that train, by name; a tied one once."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def numel(parameter: nn.Parameter) -> int:
    """Elements of a whole parameter, also where this rank holds a part of it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
