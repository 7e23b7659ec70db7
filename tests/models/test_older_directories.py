"""Directories that earlier versions of mmit wrote open as they did."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from models_support import batch_of, sample
from torch import Tensor

from mmit.models import LoadedModel, load_model, save_model

Build = Callable[..., LoadedModel]

# what version 0.1.0 put into mmit.json
KEYS = ("format", "layout", "template", "text_style", "images", "encoder", "connector", "made_from", "packages")
IMAGES = ("size", "mean", "std", "resize", "tokens_per_tile", "exact", "alpha", "max_pixels")
ENCODER = ("type", "path", "layer", "cls", "resize", "exact_resize")


def logits(loaded: LoadedModel) -> Tensor:
    with torch.no_grad():
        return loaded.model.logits(batch_of(loaded, [[sample(loaded, text=range(40, 50), images=2, trained=3)]]))


def test_a_directory_of_version_0_1_0_gives_the_same_logits(build: Build, tmp_path: Path) -> None:
    loaded = build("clip_llama")
    save_model(loaded, None, tmp_path / "model", made_from={"run": "old"})
    file = tmp_path / "model/mmit.json"
    now = json.loads(file.read_text())
    old = {name: now[name] for name in KEYS}
    old["images"] = {name: now["images"][name] for name in IMAGES}
    old["encoder"] = {name: now["encoder"][name] for name in ENCODER}
    assert old["format"] == 1
    assert set(now) - set(KEYS) <= {"new_tokens", "towers", "vocabulary", "skipped"}
    file.write_text(json.dumps(old))
    opened = load_model(tmp_path / "model", dtype=torch.float32)
    assert torch.equal(logits(opened), logits(loaded))
    assert (opened.spec, opened.template, opened.style) == (loaded.spec, loaded.template, loaded.style)
