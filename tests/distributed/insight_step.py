"""Called on every rank by exact_step: an update that is left out, and how far one moves each part."""

from typing import Any

import torch
from deepspeed_ways import Run, Way

from mmit.config import Zero
from mmit.distributed import all_reduce_sum, rank
from mmit.models import build_model
from mmit.models.rules import PARTS
from mmit.train.device_facts import held
from mmit.train.engine import Engine
from mmit.train.pieces import MOMENTS, WEIGHT, optimizer_steps, pieces, trained
from mmit.train.update_ratio import UpdateRatios

SETTINGS = {
    "zero-0": Way(Zero(stage=0)),
    "zero-2 offload": Way(Zero(stage=2, offload_optimizer="cpu")),
    "zero-2 bf16": Way(Zero(stage=2), "bf16"),
    "zero-3": Way(Zero(stage=3)),
}


def step(run: Run, *, update: bool = True) -> float:
    """The norm of the gradient."""
    tokens = int(all_reduce_sum(torch.tensor([sum(batch.trained_tokens for batch in run.batches)])))
    norm = None
    for batch in run.batches:
        run.engine.micro_step(batch, trained_tokens=tokens)
        norm = run.engine.close_micro_step(factor=1.0, update=update)
    assert norm is not None
    return norm


def cases(config: Any) -> dict[str, Any]:
    result = {}
    for name, way in SETTINGS.items():
        run, straight = Run(config, way), Run(config, way)
        engine = run.engine
        before = copy_of(engine)
        ratios = UpdateRatios(engine, every=1)
        ratios.before(1)
        step(run)
        told = ratios.after()
        after = copy_of(engine)
        kept, steps = state(engine), optimizer_steps(engine)
        norm = step(run, update=False)
        same = [torch.equal(one, other) for one, other in zip(kept, state(engine), strict=True)]
        unmoved = all(torch.equal(after[key], value) for key, value in copy_of(engine).items())
        counted = optimizer_steps(engine) == steps
        step(run)
        step(straight)
        step(straight)
        wanted, gone_on = copy_of(straight.engine), copy_of(engine)
        sizes = held(engine)
        if rank() == 0:
            names = [key for key, _ in trained(engine.module)]
            result[name] = {
                "told": told,
                "by hand": by_hand(before, after, names),
                "left out": all(same) and unmoved and counted,
                "norm": norm,
                "goes on": all(torch.equal(wanted[key], gone_on[key]) for key in wanted),
                "held": {what: sum(parts.values()) for what, parts in sizes.items()},
                "trained": sum(before[key].numel() for key in names),
                "all": sum(parameter.numel() for parameter in straight_model(config).parameters()),
            }
    return result


def straight_model(config: Any) -> torch.nn.Module:
    return build_model(config.model, dtype=torch.float32, seed=0).model


def copy_of(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in engine.weights()}


def state(engine: Engine) -> list[torch.Tensor]:
    """Master weights and moments of this rank."""
    return [piece.read(key).clone() for piece in pieces(engine) for key in (WEIGHT, *MOMENTS)]


def by_hand(before: dict[str, Any], after: dict[str, Any], names: list[str]) -> dict[str, float]:
    found = {}
    for part, starts in PARTS.items():
        own = [name for name in names if name.startswith(starts)]
        if own:
            change = sum(float((after[name] - before[name]).double().square().sum()) for name in own)
            weight = sum(float(before[name].double().square().sum()) for name in own)
            found[part] = (change / weight) ** 0.5
    return found
