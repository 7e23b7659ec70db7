"""Verbs that look at model directories: exit codes, and samples as a tiled model sees them."""

from pathlib import Path

import torch
from data_factories import make_shards
from model_factories import tiny_clip_dir, tiny_model_section
from typer.testing import CliRunner

from mmit.cli import app
from mmit.config import ComposedModel
from mmit.models import build_model, save_model

RUN = CliRunner()


def test_inspect_fails_where_it_lists_a_problem(tmp_path: Path) -> None:
    clip = tiny_clip_dir(tmp_path / "clip")
    assert RUN.invoke(app, ["inspect", str(clip)]).exit_code == 0
    weights = clip / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    told = RUN.invoke(app, ["inspect", str(clip)])
    assert (told.exit_code, "PROBLEM" in told.output) == (1, True)
    assert RUN.invoke(app, ["inspect", str(clip), "--json"]).exit_code == 1


def test_samples_are_shown_with_the_tiles_of_the_model(tmp_path: Path) -> None:
    section = tiny_model_section(tmp_path / "parts")
    section["tiling"] = {"type": "dynamic", "min_tiles": 2, "max_tiles": 2}
    loaded = build_model(ComposedModel.model_validate(section), dtype=torch.float32, seed=0)
    save_model(loaded, None, tmp_path / "model", made_from={})
    shards = make_shards(tmp_path / "data", 1)
    words = ["data", "show", str(shards.directory), "--tokenizer", str(tmp_path / "model")]
    shown = RUN.invoke(app, words)
    # two tiles and the thumbnail, each of four patches
    assert "<image> x 12" in shown.output
    refused = RUN.invoke(app, [*words, "--image-tokens", "9"])
    assert str(refused.exception).startswith("--image-tokens: ")
    # a language model alone has no pictures of its own
    alone = [*words[:-1], section["language_model"]["path"], "--template", "vicuna", "--image-tokens", "9"]
    assert "<image> x 9" in RUN.invoke(app, alone).output
