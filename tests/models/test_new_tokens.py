"""Tokens that a language model did not have: rows that are there are taken, and only new rows are trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models_support import batch_of, sample
from transformers import AddedToken, AutoModelForCausalLM

from mmit.config import ComposedModel
from mmit.errors import ConfigError
from mmit.models import LoadedModel, build_model, load_model, read_outline, save_model
from mmit.models.language_models import row_parameters, token_table
from mmit.tokenizer import load_tokenizer
from mmit.train.optim import adamw, parameter_groups

Build = Callable[..., LoadedModel]


def with_new_tokens(section: ComposedModel, *texts: str) -> ComposedModel:
    changed = section.language_model.model_copy(update={"new_tokens": texts})
    return section.model_copy(update={"language_model": changed})


def test_a_full_table_lends_the_rows_that_its_vocabulary_keeps_in_reserve(
    sections: dict[str, ComposedModel], tmp_path: Path
) -> None:
    plain = sections["clip_llama"]
    tokenizer = load_tokenizer(plain.language_model.path)
    before = len(tokenizer)
    reserved = [f"<|reserved_special_token_{number}|>" for number in range(3)]
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in reserved], special_tokens=True)
    language_model = AutoModelForCausalLM.from_pretrained(plain.language_model.path)
    language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tokenizer.save_pretrained(tmp_path / "llm")
    language_model.save_pretrained(tmp_path / "llm")
    section = plain.model_copy(
        update={"language_model": plain.language_model.model_copy(update={"path": str(tmp_path / "llm")})}
    )
    loaded = build_model(section, dtype=torch.float32, seed=0)
    table = token_table(loaded.model.language_model).weight
    assert torch.equal(table, language_model.get_parameter("model.embed_tokens.weight"))
    assert (loaded.image_id, loaded.pad_id, len(loaded.tokenizer)) == (before + 2, before + 1, before + 3)
    outline = read_outline(section)
    assert (outline.image_id, outline.pad_id) == (loaded.image_id, loaded.pad_id)
    save_model(loaded, None, tmp_path / "model", made_from={})
    opened = load_model(tmp_path / "model", dtype=torch.float32)
    assert (opened.image_id, opened.pad_id) == (loaded.image_id, loaded.pad_id)
    text = "one <image> two <|reserved_special_token_0|>"
    ids = opened.tokenizer(text).input_ids
    assert ids == loaded.tokenizer(text).input_ids
    assert ids.count(before) == ids.count(before + 2) == 1


@pytest.mark.parametrize("kind", ["clip_llama", "siglip_qwen2"])  # two tables, and one that is tied
def test_only_the_rows_of_new_tokens_train(sections: dict[str, ComposedModel], tmp_path: Path, kind: str) -> None:
    section = with_new_tokens(sections[kind], "<box>", "</box>")
    loaded = build_model(section, dtype=torch.float32, seed=0)
    model, ids = loaded.model, list(loaded.model.new_ids)
    assert loaded.tokenizer.convert_ids_to_tokens(ids) == ["<box>", "</box>"]
    assert ids[0] in loaded.tokenizer("a tree<box>").input_ids
    tables = row_parameters(model.language_model)
    assert len(tables) == (2 if kind == "clip_llama" else 1)
    before = {name: table.detach().clone() for name, table in tables.items()}
    for table in before.values():
        # an fp32 mean of some 600 rows
        torch.testing.assert_close(table[ids], table[: ids[0]].mean(0).expand(2, -1), rtol=0, atol=1e-6)

    groups = model.train_only({"connector": 1e-3, "new_tokens": 1e-2})
    optimizer = adamw(parameter_groups(model, groups, weight_decay=0.5), betas=(0.9, 0.999), eps=1e-8)
    for _ in range(3):
        model(batch_of(loaded, [[sample(loaded, text=[40, *ids, 41, ids[0]], images=1, trained=3)]])).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, table in tables.items():
        old = torch.ones(len(table), dtype=torch.bool)
        old[ids] = False
        assert torch.equal(table[old], before[name][old])
        assert bool(((table.detach() - before[name])[ids].abs().amax(dim=1) > 1e-3).all())

    save_model(loaded, None, tmp_path / "model", made_from={})
    opened = load_model(tmp_path / "model", dtype=torch.float32)
    assert opened.model.new_ids == model.new_ids
    assert torch.equal(token_table(opened.model.language_model).weight, token_table(model.language_model).weight)
    assert len(opened.model.train_only({"new_tokens": 1e-3})[0].names) == len(tables)


def test_new_tokens_that_are_none_are_refused(build: Build, sections: dict[str, ComposedModel]) -> None:
    with pytest.raises(ConfigError, match=r"the rule 'new_tokens' matches no parameter"):
        build("clip_llama").model.train_only({"new_tokens": 1e-3})
    for text, message in (("</s>", "'</s>' is a token of this tokenizer already"), (" ", "a text is empty")):
        with pytest.raises(ConfigError, match=f"new_tokens: {message}"):
            build_model(with_new_tokens(sections["clip_llama"], text), dtype=torch.float32, seed=0)
