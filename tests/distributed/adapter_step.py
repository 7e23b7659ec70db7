"""Called on every rank by exact_step: a step of a model with adapters; saved, resumed, merged, under ZeRO-2 and 3."""

from pathlib import Path
from typing import Any

import torch
from exact_step import EPS, micro_batches, settings_of

from mmit.config import Lora, Zero
from mmit.distributed import all_reduce_sum, rank
from mmit.models import LoadedModel, begin_adapter, build_model, load_model, load_weights, save_model
from mmit.models.placement import WHOLE, placed
from mmit.train import engine_state
from mmit.train.engine import Engine
from mmit.train.optim import adamw, parameter_groups
from mmit.train.partition import Partitioned
from mmit.train.trained import FirstStepCheck

RULES = {"lora": 1e-2, "connector": 1e-3, "new_tokens": 1e-2}
TABLES = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
EVERYWHERE = ("language_model", "connector", "vision_tower")
CASES = {
    "lora zero-2": (Lora(rank=4, alpha=8), Zero(stage=2)),
    "lora zero-3": (Lora(rank=4, alpha=8, targets=EVERYWHERE), Zero(stage=3)),
    "dora zero-3": (Lora(rank=4, alpha=8, targets=EVERYWHERE, dora=True), Zero(stage=3)),
    "nf4 zero-2": (Lora(rank=4, alpha=8, quantize="nf4"), Zero(stage=2)),
}


def section_of(config: Any) -> Any:
    """The model of the run file, with a token of its own."""
    language_model = config.model.language_model.model_copy(update={"new_tokens": ("<box>",)})
    return config.model.model_copy(update={"language_model": language_model})


def start(config: Any, lora: Lora, zero: Zero) -> tuple[LoadedModel, torch.optim.Optimizer]:
    """A model with an adapter that changes what it computes, born as the ZeRO stage has it."""
    with placed(Partitioned(settings_of(zero)) if zero.stage == 3 else WHOLE):
        loaded = build_model(section_of(config), dtype=torch.float32, seed=0)
    begin_adapter(loaded.model, lora, None, seed=3)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in loaded.model.named_parameters():
        if ".lora_B." in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    groups = parameter_groups(loaded.model, loaded.model.train_only(RULES), weight_decay=0.1)
    return loaded, adamw(groups, betas=(0.9, 0.999), eps=EPS)


def plain_step(config: Any, lora: Lora) -> dict[str, torch.Tensor]:
    """Parameters after one step on the mean over all trained tokens, in one process without DeepSpeed."""
    loaded, optimizer = start(config, lora, Zero(stage=0))
    batches = [batch for of_rank in micro_batches(loaded) for batch in of_rank]
    (sum(loaded.model(batch) for batch in batches) / sum(batch.trained_tokens for batch in batches)).backward()
    torch.nn.utils.clip_grad_norm_([p for p in loaded.model.parameters() if p.requires_grad], 0.5)
    optimizer.step()
    return {name: value.clone() for name, value in loaded.model.state_dict().items()}


def step(engine: Engine, loaded: LoadedModel) -> dict[str, torch.Tensor]:
    batches = micro_batches(loaded)[rank()]
    trained = int(all_reduce_sum(torch.tensor([sum(batch.trained_tokens for batch in batches)])))
    for batch in batches:
        engine.micro_step(batch, trained_tokens=trained)
        engine.close_micro_step(factor=1.0)
    return {name: value.clone() for name, value in engine.weights()}


def off(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    assert one.keys() == two.keys(), set(one) ^ set(two)
    return max((float((one[name] - two[name]).abs().max()) for name in one), default=0.0)


def cases(config: Any, folder: Path) -> dict[str, Any]:
    """By case: distance to the plain step, and whether a saved model and a resumed run have the same bits."""
    result = {}
    for case, (lora, zero) in CASES.items():
        expected = plain_step(config, lora)
        loaded, optimizer = start(config, lora, zero)
        engine = Engine(loaded.model, optimizer, settings_of(zero), dtype=torch.float32)
        check = FirstStepCheck(engine.module, seldom=loaded.model.by_row)
        got = step(engine, loaded)
        check.verify(had_images=True)
        path = folder / case.replace(" ", "-")
        engine_state.take(engine, copies=None).write(path / "state")
        if rank() == 0:
            save_model(loaded, got, path / "model", made_from={})
        torch.distributed.barrier()
        again, optimizer = start(config, lora, zero)
        resumed = Engine(again.model, optimizer, settings_of(zero), dtype=torch.float32)
        engine_state.load(resumed, path / "state")
        one, two = step(engine, loaded), step(resumed, again)
        merged = merged_while_partitioned(config, path / "model", zero)
        if rank() == 0:
            kept = load_model(path / "model", dtype=torch.float32, adapter="keep").model.state_dict()
            plain = load_model(path / "model", dtype=torch.float32).model.state_dict()
            before = build_model(section_of(config), dtype=torch.float32, seed=0).model
            [new] = before.new_ids
            moved = {name: (got[name] - before.get_parameter(name)).abs().amax(dim=1) for name in TABLES}
            result[case] = {
                "off": off({name: got[name] for name in expected}, expected),
                "saved": off({name: kept[name] for name in got}, got),
                "resumed": off(one, two),
                "moved": off(one, got),
                "new row": float(moved[TABLES[1]][new].detach()),
                "old rows": max(float(rows.detach().sum() - rows.detach()[new]) for rows in moved.values()),
                "merged": off({name: merged[name] for name in plain}, plain),
            }
    return result


def merged_while_partitioned(config: Any, directory: Path, zero: Zero) -> dict[str, torch.Tensor]:
    """The weights of a stage without adapters that starts from ``directory``."""
    settings = settings_of(zero)
    with placed(Partitioned(settings) if zero.stage == 3 else WHOLE):
        loaded = build_model(section_of(config), dtype=torch.float32, seed=7)
    load_weights(loaded.model, directory, adapter="drop")
    begin_adapter(loaded.model, None, directory, seed=0)
    groups = parameter_groups(loaded.model, loaded.model.train_only({"connector": 1e-3}), weight_decay=0.0)
    engine = Engine(loaded.model, adamw(groups, betas=(0.9, 0.999), eps=EPS), settings, dtype=torch.float32)
    return {name: value.clone() for name, value in engine.weights()}
