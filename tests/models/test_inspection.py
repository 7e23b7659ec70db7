"""mmit inspect: what a checkpoint holds, from its headers; a damaged one is told, not raised."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from model_factories import tiny_model_section
from original_factories import original_config, write_original
from safetensors.torch import load_file
from typer.testing import CliRunner

from mmit.cli import app
from mmit.config import ComposedModel
from mmit.errors import CheckpointError
from mmit.models import build_model, load_model, save_model
from mmit.models.inspection import inspect


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts (``clip``, ``llama``) and the model that they make (``run/stage/model``)."""
    folder = tmp_path_factory.mktemp("inspect")
    loaded = build_model(ComposedModel.model_validate(tiny_model_section(folder)), dtype=torch.float32, seed=1)
    save_model(loaded, None, folder / "run/stage/model", made_from={"run": "first"})
    return folder


def test_a_model_directory_is_told_with_its_parts(folder: Path) -> None:
    found = inspect(folder / "run/stage")
    assert found.kind == "LLaVA in the layout of transformers"
    assert found.problems == []
    model = load_model(folder / "run/stage", dtype=torch.float32).model
    counted = {
        "vision tower": sum(p.numel() for p in model.vision_tower.parameters()),
        "connector": sum(p.numel() for p in model.multi_modal_projector.parameters()),
        "language model": sum(p.numel() for p in model.language_model.parameters()),
    }
    assert {part.name: part.parameters for part in found.parts} == counted
    assert {part.dtypes for part in found.parts} == {("F32",)}
    facts = found.facts
    assert facts["model"] == "model"
    assert facts["vision tower"]["patch_size"] == 14
    assert facts["read at"] == {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    assert (facts["template"], facts["text_style"], facts["made_from"]) == ("vicuna", "hf", {"run": "first"})
    assert facts["images"]["resize"] == "pad"


def test_parts_alone_are_told_and_refused_with_what_to_do(folder: Path, tmp_path: Path) -> None:
    assert inspect(folder / "clip").kind == "a vision tower alone"
    assert [part.name for part in inspect(folder / "clip").parts] == ["vision tower"]
    assert inspect(folder / "llama").kind == "a language model alone"
    for name, key in (("clip", "model.encoder.path"), ("llama", "model.language_model.path")):
        with pytest.raises(CheckpointError, match=f"alone: name it as {key}"):
            load_model(folder / name, dtype=torch.float32)


@pytest.mark.parametrize(
    ("config", "kind", "why"),
    [
        ({"model_type": "tinyllava"}, "a TinyLLaVA model", "leave out the first patch of SigLIP"),
        (
            {"model": {"arch_specifier": "gelu-mlp", "vision_backbone_id": "clip-vit-l"}},
            "a run of prismatic-vlms",
            r"leave out the vision tower \(clip-vit-l\)",
        ),
    ],
)
def test_layouts_of_other_projects_are_recognised_and_refused(
    tmp_path: Path, config: dict[str, Any], kind: str, why: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert inspect(tmp_path).kind == kind
    with pytest.raises(CheckpointError, match=f"{kind}: which cannot be read: .*{why}"):
        load_model(tmp_path, dtype=torch.float32)


def test_directories_of_the_original_code_are_told_apart(folder: Path, tmp_path: Path) -> None:
    language = load_file(folder / "llama/model.safetensors")
    config = original_config(folder / "llama", folder / "clip")
    projector = {"model.mm_projector.0.weight": torch.zeros(32, 24), "model.image_newline": torch.zeros(32)}
    lora = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 32)}
    whole = write_original(tmp_path / "whole", config, {"pytorch_model.bin": language | projector}, folder / "llama")
    stage1 = write_original(tmp_path / "stage1", config, {"mm_projector.bin": projector}, folder / "llama")
    files = {"adapter_model.bin": lora, "non_lora_trainables.bin": projector}
    adapter = write_original(tmp_path / "lora", config, files, folder / "llama")
    (adapter / "adapter_config.json").write_text("{}")
    assert inspect(whole).kind.endswith("original code writes it, whole")
    assert "a projector alone: it needs its language model" in inspect(stage1).kind
    assert "a LoRA adapter with its projector" in inspect(adapter).kind
    assert [(part.name, part.tensors) for part in inspect(adapter).parts] == [("adapter", 1), ("connector", 2)]
    assert inspect(whole).facts["mm_projector_type"] == "mlp2x_gelu"


def test_what_is_wrong_is_listed(folder: Path, tmp_path: Path) -> None:
    config = original_config(folder / "llama", folder / "clip", vocab_size=7)
    wrong = {"model.mm_projector.0.weight": torch.zeros(30, 24), "model.embed_tokens.weight": torch.zeros(9, 32)}
    halves = {"pytorch_model-1.bin": wrong, "pytorch_model-2.bin": {"lm_head.weight": torch.zeros(0)}}
    directory = write_original(tmp_path / "two", config, halves, folder / "llama")
    problems = inspect(directory).problems
    assert "1 tensors are empty, as ZeRO-3 leaves them: lm_head.weight" in problems
    assert "the projector gives width 30, the language model takes 32" in problems
    assert "config.json says 7 tokens, the table of embeddings has 9 rows" in problems
    (directory / "pytorch_model-2.bin").unlink()
    assert any("names 1 files that are not there: pytorch_model-2.bin" in text for text in inspect(directory).problems)
    (directory / "pytorch_model-1.bin").write_bytes(b"PK")
    assert any("pytorch_model-1.bin is damaged" in text for text in inspect(directory).problems)


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b"[]",
        b'{"a": {"dtype": "F32", "shape": [-5, 7], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "F32", "shape": "abc", "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1.5, null], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1000000000], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, "x"]}}',
    ],
)
def test_a_header_that_lies_is_told(header: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    [problem] = inspect(file).problems
    assert problem.startswith(f"{file} is damaged or incomplete")


def test_what_is_no_plain_file_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1]")
    os.mkfifo(tmp_path / "model.safetensors")  # opening it would wait for a writer
    found = inspect(tmp_path)
    assert found.facts["weight files"] == {}
    assert "config.json is damaged: it must hold one JSON object" in found.problems


def test_a_large_file_is_told_at_once_and_a_short_one_as_incomplete(tmp_path: Path) -> None:
    """20 GB that take no space on the disk: values are never read."""
    rows, width = 1_000_000, 5_000
    entry = {"dtype": "F32", "shape": [rows, width], "data_offsets": [0, 4 * rows * width]}
    header = json.dumps({"model.embed_tokens.weight": entry}).encode()
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + 4 * rows * width)
    before = time.process_time()
    found = inspect(file)
    assert time.process_time() - before < 0.1
    assert (found.parts[0].parameters, found.parts[0].bytes) == (rows * width, 4 * rows * width)
    os.truncate(file, 1000)
    assert "has 1000 bytes where its header says" in inspect(file).problems[0]


def test_nothing_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is nothing at"):
        inspect(tmp_path / "missing")
    assert inspect(tmp_path).problems == [
        "there is no config.json and no weight file here, in model/ or in a checkpoint"
    ]


def test_the_command_prints_text_or_json(folder: Path) -> None:
    runner = CliRunner()
    text = runner.invoke(app, ["inspect", str(folder / "llama")])
    assert text.exit_code == 0
    assert "a language model alone" in text.stdout
    answer = json.loads(runner.invoke(app, ["inspect", str(folder / "llama"), "--json"]).stdout)
    assert answer["parts"][0]["name"] == "language model"
