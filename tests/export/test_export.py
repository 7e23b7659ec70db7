"""mmit export: what it writes is the same model in the class it is written for, to the bit on the way back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_factories import tiny_model_section
from models_support import files_of
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from mmit.cli import app
from mmit.config import ComposedModel, WholeModel
from mmit.errors import CheckpointError, ConfigError
from mmit.export import verify
from mmit.export.export import To, export
from mmit.models import LoadedModel, build_model, load_model, save_model

Saved = Callable[..., Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A function that gives the directory of a tiny model, saved once."""
    folder = tmp_path_factory.mktemp("export")

    def make(kind: Any = "clip_llama", **changes: Any) -> Path:
        directory = folder / "-".join((kind, *changes))
        if not directory.exists():
            section = {**tiny_model_section(folder / f"{kind}-parts", kind), **changes}
            loaded = build_model(ComposedModel.model_validate(section), dtype=torch.float32, seed=4)
            save_model(loaded, None, directory, made_from={})
        return directory

    return make


def opened(directory: Path) -> LoadedModel:
    return load_model(directory, dtype=torch.float32)


def run(directory: Path, out: Path, to: To = "hf", **options: Any) -> list[str]:
    return export(WholeModel(path=str(directory)), out, to=to, **options)


def same_to_the_bit(one: Path, two: Path) -> bool:
    mine, other = opened(one).model.state_dict(), opened(two).model.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


ANYRES = {"type": "anyres", "pinpoints": [[28, 56], [56, 28], [56, 56]]}


@pytest.mark.parametrize(
    ("kind", "changes", "reader"),
    [
        ("clip_llama", {}, "LlavaForConditionalGeneration"),
        ("siglip_qwen2", {}, "LlavaForConditionalGeneration"),
        ("open_clip_llama", {}, "LlavaForConditionalGeneration"),
        ("clip_llama", {"tiling": ANYRES}, "LlavaNextForConditionalGeneration"),
    ],
)
def test_to_transformers_and_back_keeps_every_bit(
    saved: Saved, tmp_path: Path, kind: str, changes: dict[str, Any], reader: str
) -> None:
    directory = saved(kind, **changes)
    lines = run(directory, tmp_path / "out")
    assert lines[0] == f"wrote {tmp_path / 'out'}: {reader} of transformers, float32"
    assert lines[1].startswith(f"opened again by {reader}: logits differ by at most ")
    assert "greedy answers are the same; its processor's pixels differ by at most" in lines[1]
    assert same_to_the_bit(directory, tmp_path / "out")
    assert files_of(tmp_path) == {"out"}


@pytest.mark.parametrize("changes", [{}, {"tiling": ANYRES}, {"connector": {"type": "linear"}}])
def test_to_the_original_layout_and_back_keeps_every_bit(saved: Saved, tmp_path: Path, changes: dict[str, Any]) -> None:
    directory = saved("clip_llama", **changes)
    lines = run(directory, tmp_path / "out", to="llava")
    assert "logits differ by at most 0.0e+00" in lines[1]
    assert "no class of the original code is installed here" in lines[2]
    moved = (tmp_path / "out").rename(tmp_path / "moved")  # the tower is found beside the weights
    assert same_to_the_bit(directory, moved)
    one, two = opened(directory), opened(moved)
    assert (one.spec, one.style, one.template, one.image_id) == (two.spec, two.style, two.template, two.image_id)


def test_the_original_layout_has_the_original_names(saved: Saved, tmp_path: Path) -> None:
    run(saved(), tmp_path / "out", to="llava")
    with safe_open(tmp_path / "out/model.safetensors", framework="pt") as handle:
        names = set(handle.keys())
    assert {
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.mm_projector.0.weight",
        "model.mm_projector.2.bias",
        "model.vision_tower.vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight",
    } <= names
    assert all(name.startswith(("model.", "lm_head.")) for name in names)
    config = json.loads((tmp_path / "out/config.json").read_text())
    expected = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_vision_tower": str(tmp_path / "out/vision_tower"),
        "image_aspect_ratio": "pad",
        "rope_theta": 50000.0,
        "mm_use_im_start_end": False,
    }
    assert {name: config[name] for name in expected} == expected
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} == files_of(tmp_path / "out/vision_tower")


def test_the_language_model_alone_is_a_plain_directory(saved: Saved, tmp_path: Path) -> None:
    lines = run(saved(), tmp_path / "llm", llm_only=True)
    assert "the language model alone" in lines[0]
    assert "opened again by LlamaForCausalLM" in lines[1]
    assert not {"mmit.json", "preprocessor_config.json", "processor_config.json"} & files_of(tmp_path / "llm")
    reader: Any = AutoModelForCausalLM
    alone, report = reader.from_pretrained(tmp_path / "llm", output_loading_info=True)
    assert not report["missing_keys"] | report["unexpected_keys"]
    whole = opened(saved()).model.language_model
    ids = torch.arange(30, 50)[None]
    with torch.no_grad():
        assert torch.equal(alone(ids).logits, whole(ids, use_cache=False).logits)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "llm")
    assert tokenizer("a house").input_ids == opened(saved()).tokenizer("a house").input_ids
    assert json.loads((tmp_path / "llm/config.json").read_text())["rope_theta"] == 50000.0


def test_a_model_that_no_class_holds_is_written_in_mmits_own_layout_and_says_so(saved: Saved, tmp_path: Path) -> None:
    directory = saved("clip_llama", connector={"type": "linear"})
    lines = run(directory, tmp_path / "out")
    assert "mmit's own layout" in lines[0]
    assert lines[1].startswith("opened again by mmit: logits differ by at most 0.0e+00")
    assert "no class of transformers holds this model" in lines[2]
    assert "exactly two linear layers" in lines[2]
    assert same_to_the_bit(directory, tmp_path / "out")


def test_precision_is_kept_or_changed_on_request(saved: Saved, tmp_path: Path) -> None:
    lines = run(saved(), tmp_path / "half", dtype="bf16")
    assert "bfloat16" in lines[0]
    again = run(tmp_path / "half", tmp_path / "again", to="mmit")
    assert "bfloat16" in again[0]
    with safe_open(tmp_path / "again/model.safetensors", framework="pt") as handle:
        assert {handle.get_tensor(name).dtype for name in set(handle.keys())} == {torch.bfloat16}


def test_what_a_format_cannot_hold_is_refused_with_the_reason(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="original code writes it cannot hold this model: its vision towers are"):
        run(saved("siglip_qwen2"), tmp_path / "out", to="llava")
    with pytest.raises(ConfigError, match="--dtype int3: take auto, fp32, bf16, fp16"):
        run(saved(), tmp_path / "out", dtype="int3")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(ConfigError, match="full exists; give a directory that does not exist"):
        run(saved(), tmp_path / "full")
    assert files_of(tmp_path) == {"full"}


def test_an_export_that_is_another_model_is_not_left_behind(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "TOLERANCE", -1.0)  # no model is that exact
    with pytest.raises(CheckpointError, match="does not hold the same model: logits of the text probe differ by"):
        run(saved(), tmp_path / "out")
    assert files_of(tmp_path) == set()


def test_the_command_tells_what_it_did(saved: Saved, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(saved()), str(tmp_path / "out"), "--to", "hf"])
    assert result.exit_code == 0, result.output
    assert "greedy answers are the same" in result.stdout
