"""LLaVA models of true shapes with random weights, packed steps of realistic lengths, and the operations in them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from samples import Writer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from world import make_tokenizer

from mmit.batch import IGNORE, Batch, Encoded, collate
from mmit.config import MlpConnector
from mmit.data.packing import best_fit
from mmit.images import ImageSpec
from mmit.models import LoadedModel
from mmit.models.connectors import build_connector
from mmit.models.encoders import TransformersTower, tower_from_config
from mmit.models.flops import shape_of, tower_flops
from mmit.models.vlm import VisionLanguageModel
from mmit.templates import ChatTemplate

PATCH = 14
MEAN, STD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)
TRAINED = {1: ("connector",), 2: ("connector", "language_model")}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Widths and depths of a CLIP ViT and a language model that go together; vision, text: keys of their configs."""

    pixels: int
    vision: dict[str, int]
    text: dict[str, Any]

    @property
    def image_tokens(self) -> int:
        """Patches of a picture."""
        return (self.pixels // PATCH) ** 2


_VIT_L = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
SHAPES = {
    "0.5b": Shape(  # Qwen2.5-0.5B
        pixels=336,
        vision=_VIT_L,
        text={
            "model_type": "qwen2",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
    ),
    "7b": Shape(  # Vicuna 7B
        pixels=336,
        vision=_VIT_L,
        text={
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 32000,
            "tie_word_embeddings": False,
        },
    ),
    "toy": Shape(
        pixels=56,
        vision={"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 128},
        text={
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 8064,
            "tie_word_embeddings": False,
        },
    ),
}


def language_model(shape: Shape, *, dtype: torch.dtype, device: str, layers: int | None = None) -> Any:
    """A causal language model with random weights, born on ``device``; ``layers`` in place of the shape's own."""
    fields = {**shape.text, "max_position_embeddings": 32768}
    fields["num_hidden_layers"] = layers or fields["num_hidden_layers"]
    maker: Any = AutoModelForCausalLM
    with torch.device(device):
        return maker.from_config(AutoConfig.for_model(**fields), dtype=dtype)


def vision_tower(shape: Shape, *, dtype: torch.dtype, device: str) -> TransformersTower:
    """A CLIP tower read at the layer before its last, as LLaVA does."""
    config = {"model_type": "clip_vision_model", "image_size": shape.pixels, "patch_size": PATCH, **shape.vision}
    image = {"image_mean": list(MEAN), "image_std": list(STD)}
    with torch.device(device):
        return tower_from_config(config, image, layer=-2, cls="drop", dtype=dtype)


def build(shape: Shape, *, dtype: torch.dtype, device: str, layers: int | None = None) -> LoadedModel:
    """The whole model, ready to be given to mmit's engine."""
    torch.manual_seed(0)
    tower = vision_tower(shape, dtype=dtype, device=device)
    text = language_model(shape, dtype=dtype, device=device, layers=layers)
    connector: Any = build_connector(
        MlpConnector(),
        width_in=tower.width,
        width_out=shape.text["hidden_size"],
        patches=tower.patches,
        seed=0,
        dtype=dtype,
    )
    image_id = shape.text["vocab_size"] - 1
    model = VisionLanguageModel(
        vision_tower=tower,
        connector=connector.to(device),
        language_model=text,
        spec=image_spec(shape),
        image_id=image_id,
    )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer(Path(folder))
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        template=ChatTemplate.load("plain", tokenizer),
        image_id=image_id,
        pad_id=0,
        style="hf",
        encoder={},
        connector={},
    )


def image_spec(shape: Shape) -> ImageSpec:
    """Square tiles of the tower's size."""
    size = (shape.pixels, shape.pixels)
    return ImageSpec(size=size, mean=MEAN, std=STD, resize="pad", tokens_per_tile=shape.image_tokens)


def samples(shape: Shape, stage: int, *, seed: int) -> Iterator[Encoded]:
    """Samples with the lengths of LLaVA's data (samples.py), ids and pixels drawn at random, without end."""
    generator = torch.Generator().manual_seed(seed)
    rows = shape.text["vocab_size"]
    for record in Writer(stage=stage, image_tokens=shape.image_tokens, seed=seed).records():
        ids, trained = [1], [False]
        for turn in record["conversations"]:
            marked, text = "<image>" in turn["value"], turn["value"].replace("<image>", "").split()
            if marked:
                ids += [rows - 1] * shape.image_tokens
                trained += [False] * shape.image_tokens
            answers = turn["from"] == "gpt"
            ids += [*torch.randint(3, 8000, (len(text),), generator=generator).tolist(), *([2] if answers else [])]
            trained += [answers] * (len(text) + answers)
        tokens = torch.tensor(ids)
        labels = torch.full_like(tokens, IGNORE)
        labels[:-1] = torch.where(torch.tensor(trained[1:]), tokens[1:], IGNORE)
        side, tiles = shape.pixels, int("image" in record)
        pixels = torch.randint(0, 256, (tiles, 3, side, side), generator=generator, dtype=torch.uint8)
        yield Encoded(id=record["id"], input_ids=tokens, labels=labels, pixels=pixels)


def steps(shape: Shape, stage: int, *, length: int, rows: int, count: int) -> list[list[Batch]]:
    """``count`` optimizer steps of ``rows`` packed rows of at most ``length`` tokens, one row a micro-batch."""
    mean = int(np.mean([sample.length for sample in islice(samples(shape, stage, seed=1), 200)]))
    wanted = 2 * count * rows * (length // mean + 1)
    found = [sample for sample in islice(samples(shape, stage, seed=0), wanted) if sample.length <= length]
    sizes = np.array([sample.length for sample in found], dtype=np.uint32)
    tiles = np.array([len(sample.pixels) for sample in found], dtype=np.uint16)
    order, starts = best_fit(sizes, tiles, length=length, tiles_per_row=length)
    packed = [[found[place] for place in order[first:last]] for first, last in pairwise(starts)]
    assert len(packed) >= count * rows, "more samples are needed"
    batches = [collate([row], pad_id=0, image_size=(shape.pixels, shape.pixels)) for row in packed[: count * rows]]
    return [batches[first : first + rows] for first in range(0, len(batches), rows)]


def lengths(batches: list[Batch]) -> Tensor:
    """Tokens of every sample of some batches."""
    found = []
    for batch in batches:
        starts = (batch.position_ids == 0).view(-1).nonzero().view(-1)
        ends = torch.cat([starts[1:], torch.tensor([batch.position_ids.numel()])])
        found.append((ends - starts)[: len(batch.sample_ids)])  # what is left is padding
    return torch.cat(found)


def work(shape: Shape, stage: int, *, tokens: int, squares: int, labels: int, tiles: int) -> dict[str, int]:
    """Useful operations of a step by part: no padding, nothing recomputed, the head at labelled positions only."""
    body = shape_of(language_model(shape, dtype=torch.float32, device="meta").requires_grad_(stage == 2))
    tower = vision_tower(shape, dtype=torch.float32, device="meta")
    # two matrices; the first needs no gradient of its input
    narrow, wide = tower.width, shape.text["hidden_size"]
    return {
        "tower": tiles * tower_flops(tower, image_spec(shape)),
        "connector": tiles * shape.image_tokens * (4 * narrow * wide + 6 * wide * wide),
        "language model": body.flops(tokens=tokens, squares=squares, labels=0),
        "head": body.flops(tokens=0, squares=0, labels=labels),
    }
