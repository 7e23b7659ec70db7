"""What a reader of docs/finetune.md has at hand: a folder of photos, a table about them, and a model; all tiny."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from model_factories import tiny_model_section
from PIL import Image

from mmit.config import ComposedModel
from mmit.models.build import build_model
from mmit.models.save import save_model

MODEL = "llava-hf/llava-1.5-7b-hf"
COLOURS = ("red", "green", "blue", "yellow")
ASKED = {"What shape is it?": "A square.", "How many are there?": "One."}
WIDTH = 64.0


def make_photos(folder: Path, *, count: int) -> Path:
    """``photos/001.jpg`` and so on, each of one of four colours, and ``photos.csv`` with two questions about each."""
    (folder / "photos").mkdir(parents=True)
    with (folder / "photos.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("image", "question", "answer"))
        for number in range(1, count + 1):
            colour = COLOURS[number % len(COLOURS)]
            Image.new("RGB", (40, 30 + number), colour).save(folder / "photos" / f"{number:03d}.jpg")
            table.writerows((f"{number:03d}.jpg", question, answer) for question, answer in ASKED.items())
    return folder / "photos.csv"


def make_model(folder: Path) -> Path:
    """A LLaVA directory under the name that the real one has on the hub.

    Adam moves every weight alike, so what a step changes grows with the width of a model; norms that are 64 times as
    large, with weights as much smaller, learn from the learning rates of a 7 B model as it does.
    """
    section = tiny_model_section(folder / "parts")
    loaded = build_model(ComposedModel.model_validate(section), dtype=torch.float32, seed=0)
    with torch.no_grad():
        for layer in loaded.model.language_model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.mul_(WIDTH)
            attention, mlp = layer.self_attn, layer.mlp
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                linear.weight.div_(WIDTH)
    directory = folder / MODEL
    save_model(loaded, None, directory, made_from={})
    return directory
