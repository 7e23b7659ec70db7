"""Called on every rank by exact_step: a run that changes its ZeRO stage after every step."""

from pathlib import Path
from typing import Any

import torch
from exact_step import EPS, RULES, micro_batches

from mmit.config import Zero
from mmit.distributed import all_reduce_sum, rank, world_size
from mmit.models import build_model
from mmit.train import engine_state
from mmit.train.engine import Engine, deepspeed_config
from mmit.train.optim import adamw, parameter_groups
from mmit.train.pieces import optimizer_steps

PERSISTENT = {"zero_optimization": {"stage3_param_persistence_threshold": 200}}
CHAINS = {
    torch.float32: {
        "zero-0": Zero(stage=0),
        "zero-3": Zero(stage=3, extra=PERSISTENT),
        "zero-1": Zero(stage=1),
        "zero-3 offload": Zero(stage=3, offload_optimizer="cpu"),
        "zero-2 offload": Zero(stage=2, offload_optimizer="cpu"),
    },
    torch.bfloat16: {
        "zero-2 bf16": Zero(stage=2),
        "zero-3 bf16": Zero(stage=3),
        "zero-0 bf16": Zero(stage=0),
    },
}


def make_engine(config: Any, zero: Zero, dtype: torch.dtype) -> Engine:
    loaded = build_model(config.model, dtype=dtype, seed=0)
    groups = loaded.model.train_only(RULES)
    optimizer = adamw(parameter_groups(loaded.model, groups, weight_decay=0.1), betas=(0.9, 0.999), eps=EPS)
    settings = deepspeed_config(zero, dtype=dtype, rows_per_micro_batch=1, micro_batches=2, clip_norm=0.5)
    return Engine(loaded.model, optimizer, settings, dtype=dtype)


def step(config: Any, engine: Engine) -> None:
    batches = micro_batches(build_model(config.model, dtype=torch.float32, seed=0))[rank()]
    trained = int(all_reduce_sum(torch.tensor([sum(batch.trained_tokens for batch in batches)])))
    for batch in batches:
        engine.micro_step(batch, trained_tokens=trained)
        engine.close_micro_step(factor=1.0)


def copy_of(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in engine.full_state().items()}


def cases(config: Any, folder: Path) -> dict[str, Any]:
    """One run that changes its ZeRO stage after every step, against one that stays under its first stage."""
    assert world_size() == 2
    result: dict[str, Any] = {}
    for dtype, chain in CHAINS.items():
        first, *rest = chain
        staying = make_engine(config, chain[first], dtype)
        step(config, staying)
        moving = staying
        for number, name in enumerate(rest, start=1):
            state = folder / name.replace(" ", "-")
            engine_state.save(moving, state)
            torch.distributed.barrier()
            before = copy_of(moving)
            moving = make_engine(config, chain[name], dtype)
            engine_state.load(moving, state)
            loaded = copy_of(moving)
            steps = optimizer_steps(moving)
            step(config, moving)
            step(config, staying)
            after, wanted = copy_of(moving), copy_of(staying)
            if rank() == 0:
                result[f"to {name}"] = {
                    "same bits": all(torch.equal(before[key], loaded[key]) for key in before),
                    "steps": [number, steps],
                    "moved": max(float((after[key].float() - before[key].float()).abs().max()) for key in after),
                    "off": max(float((after[key].float() - wanted[key].float()).abs().max()) for key in after),
                }
    return result
