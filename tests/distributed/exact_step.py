"""Run on every rank: one step of a tiny model, against one full-batch step in plain torch.

Prints, for each setting, the largest difference of any parameter after the step, and of loss and gradient norm; and
what a model that was born partitioned holds, by each way of making one.
"""

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import torch  # noqa: E402

from mmit.batch import IGNORE, Batch, Encoded, collate  # noqa: E402
from mmit.config import Zero, load_config  # noqa: E402
from mmit.distributed import all_reduce_sum, rank, world_size  # noqa: E402
from mmit.errors import CheckpointError  # noqa: E402
from mmit.models import build_model, load_model, load_weights, save_model  # noqa: E402
from mmit.models.absent import AbsentTower  # noqa: E402
from mmit.models.placement import WHOLE, placed  # noqa: E402
from mmit.tiling import TilePlan  # noqa: E402
from mmit.train.deepspeed_settings import deepspeed_config  # noqa: E402
from mmit.train.engine import Engine, init_process_group  # noqa: E402
from mmit.train.optim import adamw, parameter_groups  # noqa: E402
from mmit.train.partition import Partitioned  # noqa: E402

RULES = {"connector": 1e-2, "language_model": 1e-3}
EPS = 1e-3  # Adam divides by |g| + eps: a larger eps keeps rounding of tiny gradients from being blown up


def sample(number: int, *, text: int, images: int, trained: int, loaded: Any, width: int = 28) -> Encoded:
    """Pictures of ``width`` x 28 pixels; above 28 they are cut into tiles, with a newline token behind their row."""
    generator = torch.Generator().manual_seed(number)
    whole = TilePlan(1, loaded.model.spec.tokens_per_tile)
    plans = (loaded.model.spec.plan(width, 28) if width > 28 else whole,) * images
    words = torch.randint(5, 40, (text,), generator=generator)
    ids = torch.cat([torch.full((sum(plan.tokens for plan in plans),), loaded.image_id), words])
    labels = torch.full_like(ids, IGNORE)
    labels[-1 - trained : -1] = ids[-trained:] if trained else ids[:0]
    size = loaded.model.spec.canvas
    tiles = sum(plan.tiles for plan in plans)
    pixels = torch.randint(0, 256, (tiles, 3, *size), generator=generator, dtype=torch.uint8)
    return Encoded(id=str(number), input_ids=ids, labels=labels, pixels=pixels, plans=plans)


def micro_batches(loaded: Any) -> list[list[Batch]]:
    """By rank: two micro-batches with 5/1 and 2/7 trained tokens; rank 1 has no image, its first row is two samples.

    One micro-batch alone has newline tokens, behind the rows of a picture in tiles.
    """
    a = sample(1, text=9, images=1, trained=5, loaded=loaded)
    b = sample(2, text=4, images=2, trained=1, loaded=loaded, width=56)
    c = sample(3, text=6, images=0, trained=1, loaded=loaded)
    d = sample(4, text=5, images=0, trained=1, loaded=loaded)
    e = sample(5, text=12, images=0, trained=7, loaded=loaded)
    both = [[c], [d]] if loaded.model.packing_fault else [[c, d]]
    made = [[[[a]], [[b]]], [both, [[e], []]]]
    return [
        [collate(rows, pad_id=loaded.pad_id, image_size=loaded.model.spec.canvas) for rows in of_rank]
        for of_rank in made
    ]


def full_batch_step(config: Any, rules: dict[str, float] = RULES) -> tuple[dict[str, torch.Tensor], float, float]:
    """Parameters after one AdamW step on the mean over all trained tokens, in one process without DeepSpeed."""
    loaded = build_model(config.model, dtype=torch.float32, seed=0)
    groups = loaded.model.train_only(rules)
    optimizer = adamw(parameter_groups(loaded.model, groups, weight_decay=0.1), betas=(0.9, 0.999), eps=EPS)
    batches = [batch for of_rank in micro_batches(loaded) for batch in of_rank]
    total = sum(batch.trained_tokens for batch in batches)
    loss = sum(loaded.model(batch) for batch in batches) / total
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_([p for p in loaded.model.parameters() if p.requires_grad], 0.5)
    optimizer.step()
    return {k: v.clone() for k, v in loaded.model.state_dict().items()}, float(loss.detach()), float(norm)


def settings_of(zero: Zero) -> dict[str, Any]:
    return deepspeed_config(zero, dtype=torch.float32, rows_per_micro_batch=1, micro_batches=2, clip_norm=0.5)


def engine_step(
    config: Any, zero: Zero, *, checkpointing: bool, features: bool = False, rules: dict[str, float] = RULES
) -> tuple[dict[str, torch.Tensor], float, float]:
    """The same step under an engine; features: trains without a tower, on what it makes of the pictures."""
    settings = settings_of(zero)
    plain = build_model(config.model, dtype=torch.float32, seed=0)
    batches = micro_batches(plain)[rank()]
    absent = None
    if features:
        batches = [
            replace(batch, pixels=batch.pixels[:0], features=features_of(plain.model, batch)) for batch in batches
        ]
        absent = AbsentTower(plain.model.vision_tower)
    with placed(Partitioned(settings) if zero.stage == 3 else WHOLE):
        loaded = build_model(config.model, dtype=torch.float32, seed=0, tower=absent)
    groups = loaded.model.train_only(rules)
    if checkpointing:
        loaded.model.enable_activation_checkpointing()
    optimizer = adamw(parameter_groups(loaded.model, groups, weight_decay=0.1), betas=(0.9, 0.999), eps=EPS)
    engine = Engine(loaded.model, optimizer, settings, dtype=torch.float32)
    trained = int(all_reduce_sum(torch.tensor([sum(batch.trained_tokens for batch in batches)])))
    loss = torch.zeros((), dtype=torch.float64)
    norm = None
    passes: list[bool] = []
    if checkpointing:
        layer = loaded.model.language_model.get_submodule("model.layers.0.mlp")
        layer.register_forward_pre_hook(lambda module, _: passes.append(module.training))
    for batch in batches:
        loss += engine.micro_step(batch, trained_tokens=trained).double()
        norm = engine.close_micro_step(factor=1.0)
    assert norm is not None
    assert loaded.model.training
    assert passes == [True] * len(passes)
    assert len(passes) == (2 * len(batches) if checkpointing else 0), "a layer passes again in the backward pass"
    state = {name: value.clone() for name, value in engine.weights()}
    return state, float(all_reduce_sum(loss)) / trained, norm


@torch.no_grad()
def features_of(model: Any, batch: Batch) -> torch.Tensor:
    """What the tower of a model makes of the tiles of a batch; of none the shape alone."""
    tower = model.vision_tower
    return model.patches(batch.pixels) if batch.tiles else torch.zeros((0, tower.patches, tower.width))


def born_partitioned(config: Any, folder: Path) -> dict[str, Any]:
    """What a model of parts, one of a directory, and one filled afterwards hold, against the same made whole."""
    plain = build_model(config.model, dtype=torch.float32, seed=0)
    if rank() == 0:
        save_model(plain, None, folder / "saved", made_from={})
        save_model(
            plain,
            {**plain.model.state_dict(), "language_model.model.norm.weight": torch.full((32,), torch.nan)},
            folder / "broken",
            made_from={},
        )
    torch.distributed.barrier()
    by_placement = Partitioned(settings_of(Zero(stage=3)))
    with placed(by_placement):
        models = {
            "parts": build_model(config.model, dtype=torch.float32, seed=0).model,
            "directory": load_model(folder / "saved", dtype=torch.float32).model,
            "filled": build_model(config.model, dtype=torch.float32, seed=1).model,
        }
    load_weights(models["filled"], folder / "saved")
    found: dict[str, Any] = {name: held(model, plain.model, by_placement) for name, model in models.items()}
    try:
        load_weights(models["filled"], folder / "broken")
    except CheckpointError as error:
        refused = torch.tensor([int("not finite: language_model.model.norm" in str(error))])
        found["refused"] = int(all_reduce_sum(refused))
    return found


def held(model: Any, plain: Any, by_placement: Partitioned) -> dict[str, Any]:
    total = sum(parameter.numel() for parameter in plain.parameters())
    whole = sum(parameter.numel() for parameter in model.parameters())
    pieces = sum(parameter.ds_tensor.numel() for parameter in model.parameters())
    differ = []
    for (name, parameter), (_, expected) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        with by_placement.whole([parameter]):
            if not torch.equal(parameter, expected):
                differ.append(name)
    differ += [
        name
        for (name, buffer), (_, expected) in zip(model.named_buffers(), plain.named_buffers(), strict=True)
        if buffer.dtype != expected.dtype or not torch.equal(buffer, expected)
    ]
    return {"whole": whole, "share": pieces / total, "differ": differ}


def main(run_file: str) -> None:
    torch.set_num_threads(1)
    init_process_group()
    torch.set_num_threads(1)
    assert world_size() == 2
    config = load_config(Path(run_file), ['model.tiling={"type": "anyres"}'])
    expected, loss, norm = full_batch_step(config)
    result = {}
    settings = [("zero-3 activation checkpointing", Zero(stage=3))]
    settings += [(f"zero-{stage} features", Zero(stage=stage)) for stage in (2, 3)]
    for name, zero in settings:
        features = name.endswith("features")
        got, got_loss, got_norm = engine_step(
            config, zero, checkpointing=name.endswith("checkpointing"), features=features
        )
        if rank() == 0:
            there = {key for key in expected if not features or not key.startswith("vision_tower.")}
            assert got.keys() == there, set(got) ^ there
            result[name] = {
                "parameters": max(float((got[k] - expected[k]).abs().max()) for k in there),
                "loss": abs(got_loss - loss),
                "norm": abs(got_norm - norm) / norm,
            }
    result["born"] = born_partitioned(config, Path(run_file).parent)
    import adapter_step
    import encoder_step
    import insight_step

    encoders = encoder_step.cases(config, Path(run_file).parent / "encoders")
    insight = insight_step.cases(config)
    adapters = adapter_step.cases(config, Path(run_file).parent / "adapters")
    if rank() == 0:
        result["adapters"] = adapters
        result["insight"] = insight
        result["encoders"] = encoders
        start = build_model(config.model, dtype=torch.float32, seed=0).model.state_dict()
        result["moved"] = max(float((start[k] - expected[k]).abs().max()) for k in expected)
        print(json.dumps(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
