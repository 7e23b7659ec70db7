"""Directories with an adapter: self-contained, exact, opened by peft and transformers, mistaken by nobody."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from adapter_factories import ALL_PARTS, LLM, adapted, logits, two_packed_samples
from models_support import files_of
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration
from transformers.integrations import peft as peft_of_transformers
from transformers.models.auto import auto_factory
from typer.testing import CliRunner

from mmit.cli import app
from mmit.config import Lora, WholeModel
from mmit.errors import CheckpointError, ConfigError
from mmit.export.export import export
from mmit.images import normalize
from mmit.models import Frozen, LoadedModel, begin_adapter, load_model, load_weights, merge_directory, save_model
from mmit.models.adapters import adapted_layers

Build = Callable[..., LoadedModel]
OPENERS = {
    "LlavaForConditionalGeneration": LlavaForConditionalGeneration.from_pretrained,
    "AutoModelForImageTextToText": AutoModelForImageTextToText.from_pretrained,
    "PeftModel": lambda path: PeftModel.from_pretrained(
        LlavaForConditionalGeneration.from_pretrained(path / "base"), path
    ),
}


def saved(loaded: LoadedModel, directory: Path) -> Path:
    save_model(loaded, None, directory, made_from={"run": "test"})
    return directory


def first_sample(loaded: LoadedModel) -> tuple[Tensor, Tensor]:
    batch = two_packed_samples(loaded)
    end = int((batch.position_ids[0] == 0).nonzero()[1])
    return batch.input_ids[:, :end], batch.pixels


def test_the_directory_is_pefts_with_the_whole_model_in_it(build: Build, tmp_path: Path) -> None:
    directory = saved(adapted(build("clip_llama"), LLM), tmp_path / "model")
    files = files_of(directory)
    assert {"adapter_config.json", "adapter_model.safetensors", "base", "mmit.json", "tokenizer.json"} <= files
    assert not {"config.json", "model.safetensors"} & files
    assert {"config.json", "model.safetensors", "mmit.json"} <= files_of(directory / "base")
    config = json.loads((directory / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 6, "LORA")
    assert config["base_model_name_or_path"] == str(directory / "base")
    stored = load_file(directory / "adapter_model.safetensors")
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
    assert stored[name].shape == (4, 32)
    assert len(stored) == 2 * 14
    base = load_file(directory / "base" / "model.safetensors")
    assert not any("lora" in key or "base_layer" in key for key in base)


# peft's own use of a name that transformers is about to drop
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["clip_llama", "siglip_qwen2"])
def test_every_opener_gives_the_adapted_logits(build: Build, tmp_path: Path, kind: str, dora: bool) -> None:
    loaded = adapted(build(kind), ALL_PARTS.model_copy(update={"dora": dora}))
    directory = saved(loaded, tmp_path / "model")
    expected = logits(loaded)
    kept = load_model(directory, dtype=torch.float32, adapter="keep")
    assert torch.equal(logits(kept), expected)
    merged = load_model(directory, dtype=torch.float32)
    assert not adapted_layers(merged.model)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    without = load_model(directory, dtype=torch.float32, adapter="drop")
    assert float((logits(without) - expected).abs().max()) > 0.1
    ids, pixels = first_sample(loaded)
    for name, opened in OPENERS.items():
        with torch.no_grad():
            got = opened(directory).eval()(input_ids=ids, pixel_values=normalize(pixels, loaded.spec)).logits
        # transformers' own attention: the same sums in another order
        torch.testing.assert_close(got, expected[:, : ids.shape[1]], rtol=0, atol=1e-5, msg=name)
    assert type(AutoProcessor.from_pretrained(directory)).__name__ == "LlavaProcessor"


def test_without_peft_transformers_refuses_rather_than_forget_the_adapter(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = saved(adapted(build("clip_llama"), LLM), tmp_path / "model")
    for module in (peft_of_transformers, auto_factory):
        monkeypatch.setattr(module, "is_peft_available", lambda: False)
    for opened in (LlavaForConditionalGeneration, AutoModelForImageTextToText):
        with pytest.raises((OSError, ValueError)):
            opened.from_pretrained(directory)


def test_a_directory_that_was_moved_opens_in_mmit_and_nowhere_wrongly(build: Build, tmp_path: Path) -> None:
    loaded = adapted(build("clip_llama"), LLM)
    expected = logits(loaded)
    directory = saved(loaded, tmp_path / "model")
    moved = Path(shutil.move(directory, tmp_path / "moved"))
    assert torch.equal(logits(load_model(moved, dtype=torch.float32, adapter="keep")), expected)
    with pytest.raises(OSError, match=str(directory)):
        LlavaForConditionalGeneration.from_pretrained(moved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_writes_a_plain_model_with_the_adapters_logits(build: Build, tmp_path: Path, dtype: torch.dtype) -> None:
    loaded = adapted(build("clip_llama"), LLM)
    loaded.model.to(dtype)
    directory = saved(loaded, tmp_path / "model")
    assert CliRunner().invoke(app, ["merge", str(directory), str(tmp_path / "plain")]).exit_code == 0
    plain = tmp_path / "plain"
    assert files_of(plain) == files_of(directory / "base")
    opened = load_model(plain, dtype=dtype)
    assert {parameter.dtype for parameter in opened.model.parameters()} == {dtype}
    expected = logits(loaded)
    # fp32: sums in another order; bf16: each weight and each sum is rounded to 8 bits, here at other places
    allowed = 1e-5 if dtype == torch.float32 else 2**-5 * expected.abs().max().item()
    torch.testing.assert_close(logits(opened), expected, rtol=0, atol=allowed)
    with pytest.raises(CheckpointError, match="holds no adapter: there is nothing to merge"):
        merge_directory(plain, tmp_path / "again")
    with pytest.raises(ConfigError, match="plain exists; give a directory that does not"):
        merge_directory(directory, plain)


@pytest.mark.parametrize("to", ["hf", "llava"])
def test_an_export_has_the_adapter_in_its_weights(build: Build, tmp_path: Path, to: Literal["hf", "llava"]) -> None:
    loaded = adapted(build("clip_llama"), LLM)
    directory = saved(loaded, tmp_path / "model")
    export(WholeModel(path=str(directory)), tmp_path / "out", to=to)
    opened = load_model(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(opened), logits(loaded), rtol=0, atol=1e-5)


def test_an_adapter_goes_on_in_a_stage_that_asks_for_the_same(
    build: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = adapted(build("clip_llama"), LLM)
    directory = saved(loaded, tmp_path / "model")
    next_stage = build("clip_llama", seed=9)
    load_weights(next_stage.model, directory, adapter="drop")
    with caplog.at_level(logging.INFO, "mmit"):
        begin_adapter(next_stage.model, LLM.model_copy(update={"dropout": 0.1}), directory, seed=1)
    assert "goes on" in caplog.text
    assert torch.equal(logits(next_stage), logits(loaded))


@pytest.mark.parametrize("lora", [None, Lora(rank=2, alpha=6), Lora(rank=4, alpha=6, targets=("q_proj",))])
def test_an_adapter_is_merged_before_a_stage_that_asks_for_another(
    build: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture, lora: Lora | None
) -> None:
    loaded = adapted(build("clip_llama"), LLM)
    directory = saved(loaded, tmp_path / "model")
    next_stage = build("clip_llama", seed=9)
    load_weights(next_stage.model, directory, adapter="drop")
    with caplog.at_level(logging.INFO, "mmit"):
        begin_adapter(next_stage.model, lora, directory, seed=1)
    assert "is merged into the weights" in caplog.text
    torch.testing.assert_close(logits(next_stage), logits(loaded), rtol=0, atol=1e-5)
    assert bool(adapted_layers(next_stage.model)) == (lora is not None)


def test_a_state_gathered_elsewhere_is_written_in_place_of_the_models_own(build: Build, tmp_path: Path) -> None:
    loaded = adapted(build("siglip_qwen2"), LLM)
    state = {name: tensor.clone() + 1 for name, tensor in loaded.model.state_dict().items()}
    save_model(loaded, state, tmp_path / "model", made_from={})
    opened = load_model(tmp_path / "model", dtype=torch.float32, adapter="keep").model.state_dict()
    assert opened.keys() == state.keys()
    assert all(torch.equal(opened[name], tensor) for name, tensor in state.items())


def test_an_adapter_that_does_not_fit_is_refused(build: Build, tmp_path: Path) -> None:
    directory = saved(adapted(build("clip_llama"), LLM), tmp_path / "model")
    weights, config = directory / "adapter_model.safetensors", directory / "adapter_config.json"
    stored, described = load_file(weights), config.read_text()
    name = next(iter(stored))

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            load_model(directory, dtype=torch.float32)

    save_file({key: tensor for key, tensor in stored.items() if key != name}, weights)
    refused("1 tensors are missing, unexpected, of another shape or not finite")
    save_file(stored | {name: stored[name][:, 1:].contiguous()}, weights)
    refused("1 tensors are missing, unexpected, of another shape or not finite")
    save_file(stored | {name: stored[name] * float("nan")}, weights)
    refused("1 tensors are missing, unexpected, of another shape or not finite")
    save_file(stored | {"base_model.model.other.lora_A.weight": torch.zeros(4, 3)}, weights)
    refused("has an adapter for other, which the model does not have")
    weights.write_bytes(b"cut off")
    refused(r"adapter_model\.safetensors cannot be read")
    save_file(stored, weights)
    config.write_text(json.dumps(json.loads(described) | {"alpha_pattern": {"q_proj": 3}}))
    refused("adapter_config.json has alpha_pattern, which mmit does not read")
    config.write_text(json.dumps(json.loads(described) | {"peft_type": "IA3"}))
    refused("adapter_config.json has the type IA3, which mmit does not read")
    config.write_text(json.dumps(json.loads(described) | {"r": "x"}))
    refused("must say r and lora_alpha as whole numbers above 0, not 'x' and 6")


def test_frozen_weights_are_written_once_and_linked(build: Build, tmp_path: Path) -> None:
    loaded = adapted(build("siglip_qwen2"), LLM)
    loaded.model.train_only({"lora": 1e-4, "connector": 1e-5})
    first, second = tmp_path / "first", tmp_path / "second"
    save_model(loaded, None, first, made_from={}, frozen=Frozen(None))
    with torch.no_grad():
        loaded.model.get_parameter("multi_modal_projector.linear_1.weight").add_(1)
    save_model(loaded, None, second, made_from={}, frozen=Frozen(first / "base"))
    files = [file.name for file in (second / "base").glob("*.safetensors")]
    assert sorted(files) == ["frozen.safetensors", "trained.safetensors"]
    assert (first / "base" / "frozen.safetensors").samefile(second / "base" / "frozen.safetensors")
    shutil.rmtree(first)
    opened = load_model(second, dtype=torch.float32, adapter="keep")
    assert torch.equal(logits(opened), logits(loaded))
    theirs = LlavaForConditionalGeneration.from_pretrained(second / "base").state_dict()
    assert torch.equal(
        theirs["model.multi_modal_projector.linear_1.weight"],
        loaded.model.get_parameter("multi_modal_projector.linear_1.weight"),
    )
    save_model(loaded, None, tmp_path / "third", made_from={}, frozen=Frozen(first / "base"))
    assert torch.equal(logits(load_model(tmp_path / "third", dtype=torch.float32, adapter="keep")), logits(loaded))
