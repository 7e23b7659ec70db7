"""Which parameters get which learning rate, the weight-decay split, and the schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from mmit.config import Optim
from mmit.models import NEW_TOKENS, TrainGroup

Schedule = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """The schedule as a pure function of the step, so that it needs no state in a checkpoint."""

    schedule: Schedule
    warmup_fraction: float
    min_lr_fraction: float
    steps: int

    @classmethod
    def of(cls, optim: Optim, *, steps: int) -> LearningRate:
        """The schedule of a run file's ``optim`` section over a stage of ``steps``."""
        return cls(
            schedule=optim.schedule,
            warmup_fraction=optim.warmup_fraction,
            min_lr_fraction=optim.min_lr_fraction,
            steps=steps,
        )

    def factor(self, step: int) -> float:
        """Share of the peak learning rate at ``step`` (0-based), in 0..1.

        Warm-up rises linearly and its first step is not 0; the decay ends at ``min_lr_fraction`` after the last step.
        """
        warmup = math.ceil(self.warmup_fraction * self.steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.schedule == "constant":
            return 1.0
        done = (step - warmup) / max(1, self.steps - warmup)
        falling = (1 + math.cos(math.pi * done)) / 2 if self.schedule == "cosine" else 1 - done
        return self.min_lr_fraction + (1 - self.min_lr_fraction) * falling


def parameter_groups(model: nn.Module, groups: Iterable[TrainGroup], *, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: each rule split into a decayed half (matrices) and one that is not (biases, norms, embeddings).

    Every group keeps its peak learning rate under ``peak_lr``; the loop sets ``lr`` at each step.
    """
    parameters = dict(model.named_parameters())
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    result = []
    for group in groups:
        halves: dict[float, list[nn.Parameter]] = {weight_decay: [], 0.0: []}
        for name in group.names:
            parameter = parameters[name]
            # under ZeRO-3 a parameter is flat and empty between uses; its own shape is kept in ds_shape
            shape = getattr(parameter, "ds_shape", parameter.shape)
            decayed = len(shape) >= 2 and id(parameter) not in embeddings and group.pattern != NEW_TOKENS
            halves[weight_decay if decayed else 0.0].append(parameter)
        result += [
            {
                "params": members,
                "lr": group.lr,
                "peak_lr": group.lr,
                "weight_decay": decay,
                "name": group.pattern,
            }
            for decay, members in halves.items()
            if members
        ]
    return result


def adamw(groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) in torch's fused form, which needs no compiler and runs on CPU too."""
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)
