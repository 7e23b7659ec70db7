"""The demo's vision encoder: a small CLIP, trained on pictures and captions with open_clip's own classes and loss.

A batch holds groups of pictures that differ in the shape alone. Without such neighbours a contrastive loss is content
with colours, and shapes stay unread.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mmit.demo.muon import Muon, set_lr
from mmit.demo.world import Scene, World, caption, draw, make_scene
from mmit.images import ImageSpec, normalize

CONFIG_FILE = "demo-clip.json"
WEIGHTS_FILE = "demo-clip.safetensors"
LAYER = -2
"""The hidden state that the demo's models read: no caption trains the patches of the last one."""

_CONTEXT = 40
_MAX_LOGIT_SCALE = math.log(100.0)  # as in CLIP (arXiv 2103.00020, sec. 2.5)


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """Sizes and budget. groups: of pictures in a batch, one picture for each shape of the world."""

    image_size: int = 48
    patch_size: int = 8
    width: int = 128
    layers: int = 3
    text_width: int = 96
    text_layers: int = 2
    scenes: int = 1600
    groups: int = 32
    steps: int = 200
    matrix_lr: float = 1e-2
    other_lr: float = 3e-3
    seed: int = 1


def train_clip(
    world: World,
    tokenizer: PreTrainedTokenizerBase,
    settings: ClipSettings,
    directory: Path,
    *,
    on_step: Callable[[int, float], None],
) -> None:
    """Train a CLIP and write its configuration and weights into ``directory``, as open_clip reads them.

    on_step: called with each step's number, from 1, and its loss.
    """
    config_file = directory / CONFIG_FILE
    config_file.write_text(json.dumps(_config(settings, len(tokenizer)), indent=2), encoding="utf-8")
    open_clip.add_model_config(config_file)
    torch.manual_seed(settings.seed)
    model: Any = open_clip.create_model(config_file.stem)
    spec = image_spec(settings)
    rng = np.random.default_rng(settings.seed)
    pictures, captions = _pictures_and_captions(world, tokenizer, settings.scenes, spec, rng)
    optimizers = _optimizers(model, settings)
    loss_of = open_clip.ClipLoss()
    model.train()
    for step in range(1, settings.steps + 1):
        chosen = torch.from_numpy(rng.choice(settings.scenes, settings.groups, replace=False))
        # (groups, shapes) -> one batch
        images = normalize(pictures[chosen].flatten(0, 1), spec)
        loss = loss_of(*model(images, captions[chosen].flatten(0, 1)))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        set_lr(optimizers, step / settings.steps)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=_MAX_LOGIT_SCALE)
        on_step(step, loss.item())
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, directory / WEIGHTS_FILE)


def image_spec(settings: ClipSettings) -> ImageSpec:
    """How pictures are prepared for this CLIP; open_clip's own mean and deviation."""
    patches = (settings.image_size // settings.patch_size) ** 2
    return ImageSpec(
        size=(settings.image_size, settings.image_size),
        mean=open_clip.OPENAI_DATASET_MEAN,
        std=open_clip.OPENAI_DATASET_STD,
        resize="squash",
        tokens_per_tile=patches,
    )


def _config(settings: ClipSettings, vocabulary: int) -> dict[str, Any]:
    return {
        "embed_dim": settings.width,
        "vision_cfg": {
            "image_size": settings.image_size,
            "patch_size": settings.patch_size,
            "width": settings.width,
            "layers": settings.layers,
            "head_width": 32,
        },
        "text_cfg": {
            "context_length": _CONTEXT,
            "vocab_size": vocabulary + 1,  # the end token, the highest id: open_clip reads the feature there
            "width": settings.text_width,
            "heads": settings.text_width // 32,
            "layers": settings.text_layers,
        },
    }


def _pictures_and_captions(
    world: World, tokenizer: PreTrainedTokenizerBase, scenes: int, spec: ImageSpec, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Pictures (scenes, shapes, 3, H, W) uint8 and caption ids (scenes, shapes, context); each row has every shape."""
    rows = [_shapes_of(make_scene(world, rng, pairs="all"), world) for _ in range(scenes)]
    pictures = torch.stack([torch.cat([spec.prepare(png(scene, rng)) for scene in row]) for row in rows])
    ids = [[_caption_ids(caption(scene, rng), tokenizer) for scene in row] for row in rows]
    return pictures, torch.tensor(ids)


def _shapes_of(scene: Scene, world: World) -> list[Scene]:
    return [replace(scene, shape=shape) for shape in world.shapes]


def png(scene: Scene, rng: np.random.Generator) -> bytes:
    """A drawing of the scene as a PNG file's bytes."""
    file = io.BytesIO()
    draw(scene, rng).save(file, "PNG")
    return file.getvalue()


def _caption_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids = [*tokenizer.encode(text), len(tokenizer)]
    assert len(ids) <= _CONTEXT, f"a caption of {len(ids)} tokens"
    return ids + [0] * (_CONTEXT - len(ids))


def _optimizers(model: torch.nn.Module, settings: ClipSettings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for all else, as Muon's author has it."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if "resblocks" in name and p.ndim == 2]
    others = [p for name, p in named if not ("resblocks" in name and p.ndim == 2)]
    return [
        Muon(matrices, lr=settings.matrix_lr),
        torch.optim.AdamW(others, lr=settings.other_lr, weight_decay=0.0),
    ]
