"""What a rank holds of master weights and moments, as stretches of parameters, under every ZeRO stage.

DeepSpeed keeps them in flat tensors: stages 1 and 2 cut all parameters of a group, one behind the other, into equal
parts; stage 3 cuts each parameter. The functions here know where a stretch of a parameter lies; ``engine_state``
writes and reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
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
    """The stretches of trained parameters that this rank holds; each is read and written before the next is asked."""
    if engine.zero_stage == 3:
        yield from _pieces_of_zero_3(engine)
        return
    for name, parameter in trained(engine.module):
        if hasattr(parameter, "_hp_mapping"):
            yield from _piece_of_zero_1_2(name, parameter, _inner(engine))
        else:
            yield _whole(name, parameter, _inner(engine))


def _pieces_of_zero_3(engine: Engine) -> Iterator[Piece]:
    """Sub-group by sub-group, as DeepSpeed updates them: one that lies on disk is in memory while it is its turn."""
    outer: Any = engine.optimizer
    moments = _inner(engine).state
    names = {id(parameter): name for name, parameter in trained(engine.module)}
    for group, members in enumerate(outer.fp16_groups):
        flat = outer.fp32_partitioned_groups_flat[group]

        def write(where: slice, key: str, value: Tensor, flat: Tensor = flat) -> None:
            written.add(key)
            (flat.data if key == WEIGHT else moments[flat][key])[where].copy_(value)

        def read(where: slice, key: str, flat: Tensor = flat) -> Tensor:
            # a copy: what lies on disk passes through a buffer that the next sub-group takes
            return (flat.data if key == WEIGHT else moments[flat][key])[where].float().clone()

        with in_memory(outer, group) as written:
            for parameter in members:
                _, offset, held = outer.grad_position[outer.get_param_id(parameter)]
                # equal on all ranks; the last ones hold padding at their end
                start = parameter.ds_process_group.rank() * held
                length = min(held, parameter.ds_numel - start)
                if length > 0:
                    yield Piece(
                        name=names[id(parameter)],
                        start=start,
                        length=length,
                        read=partial(read, slice(offset, offset + length)),
                        write=partial(write, slice(offset, offset + length)),
                    )
            if written:  # the weights that the model computes with, wherever they lie
                outer._reassign_or_swap_out_partitioned_parameters(group)


@contextmanager
def in_memory(optimizer: Any, group: int) -> Generator[set[str]]:  # noqa: ANN401  (DeepSpeed's classes share no type)
    """While in force, a sub-group's master weights and moments are in memory (ZeRO-3), also where they lie on disk.

    Gives a set: where something was put into it, they are written back.
    """
    written: set[str] = set()
    on_disk = optimizer._swappable_optimizer_subgroup(group)
    if on_disk:
        optimizer._optimizer_states_and_gradient_swap_in(group)
    yield written
    if on_disk and written:
        optimizer._optimizer_states_and_gradient_swap_out(group)
    elif on_disk:
        optimizer._release_swap_buffers(group)


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
    for number, (flat, group) in enumerate(_flat_tensors(engine) if steps else ()):
        with in_memory(outer, number) if engine.zero_stage == 3 else nullcontext(set()) as written:
            written.update(MOMENTS)
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
