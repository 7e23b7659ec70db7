"""What trains: the table before step 1, and the check after it that exactly that was reached."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmit.distributed import all_reduce_sum
from mmit.errors import TrainingError
from mmit.models import TrainGroup, partner

_BEHIND_PICTURES = ("vision_tower.", "multi_modal_projector.", "image_newline")


def table(model: nn.Module, groups: Sequence[TrainGroup]) -> str:
    """Lines of rule, tensors, parameters and peak learning rate; frozen parts last."""
    parameters = dict(model.named_parameters())
    lines = [("trains", "tensors", "parameters", "peak lr")]
    trained: set[str] = set()
    for group in groups:
        lines.append((group.pattern, str(len(group.names)), f"{_count(parameters, group.names):,}", f"{group.lr:g}"))
        trained.update(group.names)
    for part, _ in model.named_children():
        frozen = [name for name in parameters if name.startswith(f"{part}.") and name not in trained]
        if frozen:
            lines.append((f"{part} (frozen)", str(len(frozen)), f"{_count(parameters, frozen):,}", "-"))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join(
        f"  {line[0]:<{widths[0]}}  {line[1]:>{widths[1]}}  {line[2]:>{widths[2]}}  {line[3]:>{widths[3]}}"
        for line in lines
    )


def _count(parameters: dict[str, nn.Parameter], names: Sequence[str]) -> int:
    # under ZeRO-3 numel() is 0 between uses; ds_numel is the whole
    return sum(int(getattr(parameters[name], "ds_numel", parameters[name].numel())) for name in names)


class FirstStepCheck:
    """Made before the first step, asked after it: a gradient reached every trained tensor, no frozen one changed.

    A gradient, not a changed weight, is asked of trained tensors: at a small learning rate a weight may round back to
    its old value. Tensors that only pictures reach are asked after the first step that had one; seldom: those that a
    step need not reach, the tables of new tokens.
    """

    def __init__(self, model: nn.Module, *, seldom: frozenset[str] = frozenset()) -> None:
        self.is_done = False
        self._model = model
        self._seldom = seldom
        self._before = {name: _checksum(parameter) for name, parameter in model.named_parameters()}
        self._reached: dict[str, Tensor] = {}
        self._hooks = [
            parameter.register_hook(lambda gradient, name=name: self._note(name, gradient))
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]

    def _note(self, name: str, gradient: Tensor) -> None:
        reached = gradient.detach().any()
        self._reached[name] = self._reached[name] | reached if name in self._reached else reached

    def verify(self, *, had_images: bool) -> None:
        """After a step; collective. Raises TrainingError naming the tensors that break the rule."""
        if had_images:
            self.is_done = True
            for hook in self._hooks:
                hook.remove()
        changed = {name for name, p in self._model.named_parameters() if _checksum(p) != self._before[name]}
        frozen = [name for name, p in self._model.named_parameters() if not p.requires_grad and name in changed]
        if frozen:
            raise TrainingError(f"frozen tensors changed in the first step: {_some(frozen)}; this is a fault of mmit")
        trained = [name for name, parameter in self._model.named_parameters() if parameter.requires_grad]
        device = next(self._model.parameters()).device
        reached = torch.tensor(
            [int(self._reached.get(name, False) or self._reached.get(partner(name), False)) for name in trained],
            device=device,
        )
        ranks_reached = all_reduce_sum(reached).tolist()
        missed = [
            name
            for name, ranks in zip(trained, ranks_reached, strict=True)
            if ranks == 0 and name not in self._seldom and (had_images or not name.startswith(_BEHIND_PICTURES))
        ]
        if missed:
            raise TrainingError(
                f"no gradient reached {len(missed)} trained tensors: {_some(missed)}; "
                "leave them out of the stage's 'train' rules, or set their learning rate to 0"
            )


def _checksum(parameter: nn.Parameter) -> int:
    """A sum over the bits held by this rank: equal where no bit changed, as good as certain to differ elsewhere."""
    held = getattr(parameter, "ds_tensor", parameter)
    if getattr(held, "final_location", None) == "nvme":  # in memory or not, as it happens: read it
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return _sum_of_bits(parameter)
    return _sum_of_bits(held)


def _sum_of_bits(values: Tensor) -> int:
    held = values.detach().contiguous().reshape(-1)
    bits = held.view(torch.int16 if held.element_size() == 2 else torch.int32)
    return int(bits.sum(dtype=torch.int64))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
