"""Called on every rank by exact_step: a step that trains layers of three encoders side by side, under ZeRO-2 and 3."""

from pathlib import Path
from typing import Any

import timm
import torch
from exact_step import engine_step, full_batch_step
from model_factories import tiny_clip_dir, tiny_dino_dir
from pydantic import TypeAdapter
from tiny_timm import weights_of

from mmit.config import Encoder, Zero
from mmit.distributed import rank
from mmit.models import build_model

RULES = {"connector": 1e-2, "vision_tower.layers.1-": 1e-3}


def cases(config: Any, folder: Path) -> dict[str, Any]:
    """By ZeRO stage the distance of the parameters to the plain step; and the names of those that moved."""
    if rank() == 0:
        folder.mkdir()
        tiny_clip_dir(folder / "clip")
        tiny_dino_dir(folder / "dino", "dinov3_vit")
        weights_of(timm.create_model("tiny_eva"), folder / "eva.pt")
    torch.distributed.barrier()
    encoders = TypeAdapter(Encoder).validate_python(
        [
            {"type": "transformers", "path": str(folder / "clip"), "layer": [-1, 1]},
            {"type": "timm", "name": "tiny_eva", "pretrained": str(folder / "eva.pt"), "layer": -1},
            {"type": "transformers", "path": str(folder / "dino"), "layer": -1, "resize": "squash"},
        ]
    )
    model = config.model.model_copy(update={"encoder": encoders, "tiling": None})
    config = config.model_copy(update={"model": model})
    expected, _, _ = full_batch_step(config, RULES)
    start = build_model(config.model, dtype=torch.float32, seed=0).model.state_dict()
    result = {"moved": sorted(name for name in start if not torch.equal(start[name], expected[name]))}
    for stage in (2, 3):
        got, _, _ = engine_step(config, Zero(stage=stage), checkpointing=False, rules=RULES)
        if rank() == 0:
            result[f"zero-{stage}"] = max(float((got[name] - expected[name]).abs().max()) for name in expected)
    return result
