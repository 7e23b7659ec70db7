"""What a stage chooses and a model or a machine may not have: attention, kernels, shared rows, precision.

What the model rules out is a mistake; what only this machine rules out is a note, since another may train. The run
itself refuses either with the same reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from mmit.config import RunConfig, Stage
from mmit.errors import ConfigError
from mmit.models import VisionLanguageModel
from mmit.models.attention_choice import why_not_ever, why_not_here
from mmit.models.kernels import LIGER, why_no_liger, why_no_liger_here
from mmit.models.shared_rows import why_not_shared
from mmit.train.launch import check_ranks, local_ranks


@dataclass(frozen=True)
class RuledOut:
    """A choice that cannot be had, as a sentence. elsewhere: another machine may have it."""

    told: str
    elsewhere: bool = False


def ruled_out(stage: Stage, name: str, model: VisionLanguageModel, *, precision: str) -> Iterator[RuledOut]:
    """The choices of a stage that ``model``, which needs no values, or this machine rules out."""
    on_gpu = torch.cuda.is_available()
    if stage.attention != "auto":
        told = f"stages.{name}.attention: {stage.attention} does not serve"
        dtype = torch.bfloat16 if precision == "bf16" or (precision == "auto" and on_gpu) else torch.float32
        if reason := why_not_ever(model.language_model, stage.attention):
            yield RuledOut(f"{told}: {reason}; set it to auto")
        elif reason := why_not_here(
            model.language_model, stage.attention, device="cuda" if on_gpu else "cpu", dtype=dtype
        ):
            yield RuledOut(f"{told} on this machine: {reason}", elsewhere=True)
    if stage.kernels == LIGER:
        told = f"stages.{name}.kernels: liger does not serve"
        if reason := why_no_liger(model.language_model):
            yield RuledOut(f"{told}: {reason}; set it to auto")
        elif reason := why_no_liger_here(torch.device("cuda" if on_gpu else "cpu")):
            yield RuledOut(f"{told} on this machine: {reason}", elsewhere=True)
    if stage.parallel.sequence > 1:
        attention = model.attention if stage.attention == "auto" else stage.attention
        if reason := why_not_shared(model, stage.parallel.sequence, attention=attention):
            kind = type(model.language_model).__name__
            yield RuledOut(f"stages.{name}.parallel.sequence: {kind} cannot share a row: {reason}; set it to 1")


def not_on_this_machine(config: RunConfig) -> Iterator[RuledOut]:
    """What this machine does not offer to a run, whatever its model; needs DeepSpeed."""
    from mmit.train.engine import resolve_precision

    ranks = local_ranks(config)
    yield from _told(lambda: resolve_precision(config.precision))
    for name, stage in config.stages.items():
        yield from _told(partial(check_ranks, stage, name, ranks))


def _told(check: Callable[[], object]) -> Iterator[RuledOut]:
    try:
        check()
    except ConfigError as error:
        yield RuledOut(str(error), elsewhere=True)
