"""InstructBLIP directories of transformers: read with equal logits, written, opened by its class with equal answers."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from data_factories import picture
from factories import tiny_bert_tokenizer, tiny_llama_tokenizer
from model_factories import randomize
from models_support import batch_of
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from transformers import (
    BlipImageProcessor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    OPTConfig,
)

from mmit.config import ComposedModel, WholeModel
from mmit.conversation import Conversation, ImageRef, Message
from mmit.errors import CheckpointError
from mmit.models import LoadedModel, build_model, load_model, load_weights, read_outline, save_model
from mmit.models.formats.instructblip import module_name
from mmit.models.prompts import encode_prompt

Kind = Literal["llama", "opt"]
QUESTION = "What colour is the circle?"
QUERIES = 5


def write_instructblip(directory: Path, kind: Kind) -> Path:
    """An InstructBLIP model of 4 patches as transformers saves it, with its processor."""
    tokenizer = tiny_llama_tokenizer(directory)
    questions = tiny_bert_tokenizer(directory / "questions")
    pixels = BlipImageProcessor(size={"height": 28, "width": 28}, resample=Image.Resampling.BICUBIC)
    InstructBlipProcessor(pixels, tokenizer, questions, num_query_tokens=QUERIES).save_pretrained(directory)
    common: dict[str, Any] = {"vocab_size": len(tokenizer) + 3, "hidden_size": 32, "num_hidden_layers": 2}
    common |= {"num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2}
    text = (
        LlamaConfig(**common, intermediate_size=48)
        if kind == "llama"
        else OPTConfig(**common, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0, pad_token_id=0)
    )
    tower: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    qformer: dict[str, Any] = {"vocab_size": len(questions) + 2, "max_position_embeddings": 40, "hidden_size": 16}
    qformer |= {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    config = InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(**tower).to_dict(),
        qformer_config=InstructBlipQFormerConfig(**qformer, encoder_hidden_size=24).to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=tokenizer.get_vocab()["<image>"],
    )
    model = InstructBlipForConditionalGeneration(config)
    randomize(model)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    folder = tmp_path_factory.mktemp("instructblip")
    return {"llama": write_instructblip(folder / "llama", "llama"), "opt": write_instructblip(folder / "opt", "opt")}


def asked() -> Conversation:
    message = Message(role="user", content=(ImageRef(0), QUESTION))
    return Conversation(id="ask", messages=(message,), images=(picture(40, 20, colour="teal", kind="PNG"),))


def ours(loaded: LoadedModel) -> tuple[list[int], Tensor, list[int]]:
    """Ids of the prompt, logits (T, V), and the greedy answer."""
    model = loaded.model
    model.spec = replace(model.spec, exact=True)
    prompt = encode_prompt(loaded, asked())
    with torch.no_grad():
        logits = model.logits(batch_of(loaded, [[prompt]]))[0]
    return prompt.input_ids.tolist(), logits, model.generate(prompt, max_new_tokens=6)


def theirs(directory: Path) -> tuple[list[int], Tensor, list[int]]:
    """The same by transformers' own processor and class."""
    reader: Any = InstructBlipForConditionalGeneration
    model, report = reader.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    processor = InstructBlipProcessor.from_pretrained(directory, backend="pil")
    image = Image.open(io.BytesIO(asked().images[0])).convert("RGB")
    inputs = processor(images=image, text=QUESTION, return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**inputs).logits[0]
        made = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    ids = inputs["input_ids"][0].tolist()
    answer = made[0].tolist()
    return ids, logits, answer[len(ids) :] if answer[: len(ids)] == ids else answer


def agree(loaded: LoadedModel, directory: Path) -> None:
    ids, logits, answer = ours(loaded)
    other_ids, other_logits, other_answer = theirs(directory)
    assert ids == other_ids
    # the same operations; attention takes another kernel where there is a mask of ones
    torch.testing.assert_close(logits, other_logits, rtol=0, atol=1e-4)
    assert answer == other_answer


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_a_directory_of_transformers_is_read_with_equal_ids_logits_and_answer(
    kind: Kind, directories: dict[Kind, Path]
) -> None:
    loaded = load_model(directories[kind], dtype=torch.float32)
    assert (loaded.style, loaded.template.name) == ("blip", "instructblip")
    assert loaded.connector["instruction"]["length"] == 40  # positions bound InstructBLIP's 128
    agree(loaded, directories[kind])
    outline = read_outline(WholeModel(path=str(directories[kind])))
    assert (outline.spec, outline.style) == (load_model(directories[kind], dtype=torch.float32).spec, "blip")


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_what_was_trained_is_written_back_and_opens_with_transformers_class(
    kind: Kind, directories: dict[Kind, Path], tmp_path: Path
) -> None:
    loaded = load_model(directories[kind], dtype=torch.float32)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    save_model(loaded, None, tmp_path / "out", made_from={})
    assert json.loads((tmp_path / "out" / "mmit.json").read_text())["layout"] == "instructblip"
    assert names_in(tmp_path / "out") == names_in(directories[kind])
    agree(loaded, tmp_path / "out")
    again = load_model(tmp_path / "out", dtype=torch.float32)
    state = again.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in loaded.model.state_dict().items())


def names_in(directory: Path) -> set[str]:
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def composed(directory: Path, **changes: Any) -> ComposedModel:
    """A fresh Q-Former between the tower of an InstructBLIP directory and a Llama."""
    content: dict[str, Any] = {
        "encoder": {"type": "transformers", "path": str(directory), "layer": -1, "cls": "keep", "resize": "squash"},
        "connector": {
            "type": "qformer",
            **{"tokens": 3, "hidden": 16, "depth": 2, "heads": 2, "intermediate": 32},
            "instruction": {"tokenizer": str(directory / "qformer_tokenizer"), "length": 20, "positions": 24},
        },
        "language_model": {"template": "instructblip", "text_style": "blip", "path": ""},
    }
    for key, value in changes.items():
        part, _, name = key.partition("__")
        content[part][name] = value
    return ComposedModel.model_validate(content)


def test_a_model_that_was_composed_here_opens_with_transformers_class(
    directories: dict[Kind, Path], sections: dict[str, ComposedModel], tmp_path: Path
) -> None:
    llm = sections["clip_llama"].language_model.path
    loaded = build_model(composed(directories["llama"], language_model__path=llm), dtype=torch.float32, seed=3)
    save_model(loaded, None, tmp_path / "out", made_from={})
    agree(loaded, tmp_path / "out")


def test_a_fresh_model_starts_from_the_qformer_of_another(
    directories: dict[Kind, Path], sections: dict[str, ComposedModel], tmp_path: Path
) -> None:
    section = composed(
        directories["llama"],
        language_model__path=sections["clip_llama"].language_model.path,
        **{"connector__tokens": QUERIES, "connector__depth": 3, "connector__pretrained": str(directories["llama"])},
    )
    started = build_model(section, dtype=torch.float32, seed=3)
    origin = load_model(directories["llama"], dtype=torch.float32).model.state_dict()
    for name, tensor in started.model.state_dict().items():
        if name.startswith("multi_modal_projector.") and "language_projection" not in name:
            rows = slice(len(tensor) if "position_embeddings" in name or "word_embeddings" in name else None)
            assert torch.equal(tensor, origin[name][rows]), name
    save_model(started, None, tmp_path / "out", made_from={})
    assert json.loads((tmp_path / "out" / "mmit.json").read_text())["connector"]["pretrained"] == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"language_model__text_style": "hf"}, "its processor writes text in the style 'blip', this model reads 'hf'"),
        ({"encoder__resize": "pad"}, "InstructBlip squashes a picture to the encoder's size"),
        ({"encoder__layer": -2}, "InstructBlip reads its encoder at layer -1 and keeps the class token"),
        ({"connector__instruction": None}, "InstructBlip's connector is a Q-Former that reads the question"),
    ],
)
def test_what_transformers_would_read_otherwise_is_kept_in_mmits_own_layout(
    changes: dict[str, Any],
    reason: str,
    directories: dict[Kind, Path],
    sections: dict[str, ComposedModel],
    tmp_path: Path,
) -> None:
    section = composed(directories["llama"], language_model__path=sections["clip_llama"].language_model.path, **changes)
    save_model(build_model(section, dtype=torch.float32, seed=3), None, tmp_path / "out", made_from={})
    kept = json.loads((tmp_path / "out" / "mmit.json").read_text())
    assert kept["layout"] == "own"
    assert reason in kept["not_llava_because"]
    load_model(tmp_path / "out", dtype=torch.float32)


def test_a_stage_that_reads_the_encoder_otherwise_does_not_start_from_it(
    directories: dict[Kind, Path], sections: dict[str, ComposedModel]
) -> None:
    llm = sections["clip_llama"].language_model.path
    section = composed(directories["llama"], language_model__path=llm, encoder__layer=-2)
    model = build_model(section, dtype=torch.float32, seed=3).model
    with pytest.raises(CheckpointError, match=r"reads the encoder at layer -1 \(full\), the run file at layer -2"):
        load_weights(model, directories["llama"])


Change = Callable[[Path], object]


def without(name: str) -> Change:
    return lambda directory: (
        shutil.rmtree(directory / name) if (directory / name).is_dir() else (directory / name).unlink()
    )


def with_config(**changes: Any) -> Change:
    def change(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        for key, value in changes.items():
            part, _, name = key.partition("__")
            (config[part] if name else config).__setitem__(name or part, value)
        (directory / "config.json").write_text(json.dumps(config))

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without("qformer_tokenizer"), r"lacks qformer_tokenizer/tokenizer.json \(the Q-Former's tokenizer\); copy"),
        (without("tokenizer.json"), r"lacks tokenizer.json \(the language model's tokenizer\); copy"),
        (without("processor_config.json"), r"lacks preprocessor_config.json \(mean and std of the pixels\); copy"),
        (with_config(use_decoder_only_language_model=False), r"its language model \(llama\) has an encoder"),
        (with_config(qformer_config=None), "config.json lacks qformer_config"),
        (with_config(qformer_config__hidden_act="relu"), "qformer_config.hidden_act relu: only gelu can be read"),
    ],
)
def test_what_is_missing_or_unknown_is_named(
    change: Change, sentence: str, directories: dict[Kind, Path], tmp_path: Path
) -> None:
    directory = shutil.copytree(directories["llama"], tmp_path / "copy")
    change(directory)
    with pytest.raises(CheckpointError, match=sentence):
        load_model(directory, dtype=torch.float32)


def test_modules_have_the_names_of_transformers_class(directories: dict[Kind, Path]) -> None:
    loaded = load_model(directories["llama"], dtype=torch.float32)
    reference = InstructBlipForConditionalGeneration.from_pretrained(directories["llama"])
    known = {name for name, _ in reference.named_modules()}
    parts = ("language_model.model.layers.", "vision_tower.model.encoder.", "multi_modal_projector.qformer.")
    chosen = [name for name, _ in loaded.model.named_modules() if name.startswith(parts)]
    assert len(chosen) > 50
    assert {module_name(name) for name in chosen} <= known
