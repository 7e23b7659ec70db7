"""Models from parts: what fits, what grows, what is refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from factories import tiny_qwen_tokenizer
from model_factories import tiny_llm_dir, tiny_model_section
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmit.config import ComposedModel, LanguageModel
from mmit.errors import CheckpointError, ConfigError
from mmit.models import LoadedModel, build_model, find_model_directory
from mmit.models.language_models import grow_embeddings, read_language_model, token_table

Build = Callable[..., LoadedModel]


def tables(language_model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """The input table and the head's."""
    head = language_model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    return token_table(language_model).weight, head.weight


def test_a_table_grows_to_hold_image_and_padding_and_new_rows_are_the_mean(
    build: Build, sections: dict[str, ComposedModel]
) -> None:
    path = sections["clip_llama"].language_model.path
    before, _ = tables(read_language_model(path, dtype=torch.float32))
    loaded = build()
    after, head = tables(loaded.model.language_model)
    rows = before.shape[0]
    assert len(loaded.tokenizer) == rows + 2  # <image> and <pad>
    assert after.shape[0] % 64 == 0
    assert after.shape[0] >= rows + 2
    assert torch.equal(after[:rows], before)
    torch.testing.assert_close(after[loaded.image_id], before.mean(dim=0))
    torch.testing.assert_close(after[-1], before.mean(dim=0))
    assert head.shape == after.shape
    assert not torch.equal(head[:rows], after[:rows])


def test_a_table_that_is_large_enough_stays_and_ties_stay(build: Build, sections: dict[str, ComposedModel]) -> None:
    path = sections["siglip_qwen2"].language_model.path
    rows = token_table(read_language_model(path, dtype=torch.float32)).num_embeddings
    language_model = build("siglip_qwen2").model.language_model
    table, head = tables(language_model)
    assert table.shape[0] == rows
    assert head is table
    grow_embeddings(language_model, rows + 1)
    table, head = tables(language_model)
    assert table.shape[0] == -(-(rows + 1) // 64) * 64
    assert head is table


def test_two_builds_are_equal_and_the_global_state_does_not_matter(build: Build) -> None:
    first = build().model.state_dict()
    torch.manual_seed(99)
    second = build().model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_bf16_parts_are_bf16_and_rotary_frequencies_stay_fp32(sections: dict[str, ComposedModel]) -> None:
    model = build_model(sections["open_clip_llama"], dtype=torch.bfloat16, seed=0).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.get_buffer("language_model.model.rotary_emb.inv_freq").dtype == torch.float32


def test_a_tokenizer_of_another_model_is_refused(sections: dict[str, ComposedModel], tmp_path: Path) -> None:
    directory = tiny_llm_dir(tmp_path / "llm")
    tokenizer = tiny_qwen_tokenizer(tmp_path / "other")
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(400)])
    for file in directory.glob("tokenizer*"):
        file.unlink()
    tokenizer.save_pretrained(directory)
    section = ComposedModel(
        encoder=sections["clip_llama"].encoder, language_model=LanguageModel(path=str(directory), template="vicuna")
    )
    with pytest.raises(ConfigError, match=r"tokenizer of \d+ tokens but a model of \d+ embeddings: they do not belong"):
        build_model(section, dtype=torch.float32, seed=0)


def test_a_language_model_that_is_missing_or_incomplete_is_named(
    sections: dict[str, ComposedModel], tmp_path: Path
) -> None:
    def build_with(path: Path) -> LoadedModel:
        section = ComposedModel(
            encoder=sections["clip_llama"].encoder, language_model=LanguageModel(path=str(path), template="vicuna")
        )
        return build_model(section, dtype=torch.float32, seed=0)

    with pytest.raises(ConfigError, match=r"there is no directory .*nowhere"):
        build_with(tmp_path / "nowhere")
    directory = shutil.copytree(tiny_llm_dir(tmp_path / "llm"), tmp_path / "half")
    from safetensors.torch import load_file, save_file

    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 tensors \(model\.layers\.1\.mlp\.up_proj\.weight\)"):
        build_with(directory)


@pytest.mark.parametrize(("part", "key"), [("encoder", "model.encoder.path"), ("llm", "model.language_model.path")])
def test_the_weights_of_a_part_that_are_cut_off_or_gone_are_named_by_its_key(
    tmp_path: Path, part: str, key: str
) -> None:
    section = ComposedModel.model_validate(tiny_model_section(tmp_path))
    weights = tmp_path / {"encoder": "clip", "llm": "llama"}[part] / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 50)
    for said in ("not fully covered", "no file named model.safetensors"):
        with pytest.raises(ConfigError, match=f"{key}: {weights.parent} cannot be read as .*{said}"):
            build_model(section, dtype=torch.float32, seed=0)
        weights.unlink(missing_ok=True)


def test_a_model_directory_is_found_in_a_stages_folder(tmp_path: Path) -> None:
    def model(folder: Path) -> Path:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        return folder

    def checkpoint(step: int, *, complete: bool) -> Path:
        found = model(tmp_path / f"stage/checkpoints/step-{step:06d}/model")
        if complete:
            (found.parent / "COMPLETE").touch()
        return found

    with pytest.raises(CheckpointError, match="there is no model directory"):
        find_model_directory(tmp_path / "stage")
    checkpoint(30, complete=False)
    with pytest.raises(CheckpointError, match="holds no model"):
        find_model_directory(tmp_path / "stage")
    ten, twenty = checkpoint(10, complete=True), checkpoint(20, complete=True)
    assert find_model_directory(tmp_path / "stage") == twenty
    assert find_model_directory(ten) == ten
    assert find_model_directory(ten.parent) == ten
    final = model(tmp_path / "stage/model")
    assert find_model_directory(tmp_path / "stage") == final
