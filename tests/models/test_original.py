"""Directories of LLaVA's original code: every kind of them gives the model that its parts make."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models_support import batch_of, sample
from original_factories import Parts, Tensors, make_parts, opened, original_config, write_original
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer
from typer.testing import CliRunner

from mmit.cli import app
from mmit.config import WholeModel
from mmit.conversation import Conversation, ImageRef, Message
from mmit.errors import CheckpointError, ConfigError
from mmit.images import ImageSpec
from mmit.models import LoadedModel, load_model, load_weights, read_outline, save_model
from mmit.tiling import Anyres


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return make_parts(tmp_path_factory.mktemp("original"))


@pytest.fixture
def write(parts: Parts, tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a whole directory, with changes of config.json and of its tensors."""

    def make(tensors: Tensors | None = None, **config: Any) -> Path:
        content = {**parts.language, **parts.projector, **(tensors or {})}
        files = {"pytorch_model.bin": {name: tensor for name, tensor in content.items() if tensor is not None}}
        return write_original(
            tmp_path / "llava", original_config(parts.llm, parts.tower, mm_hidden_size=24, **config), files, parts.llm
        )

    return make


def logits(loaded: LoadedModel) -> Tensor:
    with torch.no_grad():
        return loaded.model.logits(batch_of(loaded, [[sample(loaded, text=range(40, 50), images=2, trained=3)]]))


def test_a_whole_directory_is_the_model_of_its_parts(parts: Parts, write: Callable[..., Path]) -> None:
    loaded = opened(write())
    assert torch.equal(logits(loaded), logits(parts.composed))
    assert (loaded.style, loaded.template.name) == ("llava", "vicuna")
    assert loaded.spec == ImageSpec(
        size=(28, 28),
        mean=parts.composed.spec.mean,
        std=parts.composed.spec.std,
        resize="pad",
        tokens_per_tile=4,
        exact=True,
    )


def test_shards_safetensors_and_a_borrowed_model_type_make_no_difference(
    parts: Parts, write: Callable[..., Path], tmp_path: Path
) -> None:
    expected = logits(parts.composed)
    whole = write(model_type="llava")  # LLaVA 1.5 calls itself so; transformers would take it for its own, of 7 B
    assert torch.equal(logits(opened(whole)), expected)
    tensors = {**parts.language, **parts.projector}
    (whole / "pytorch_model.bin").unlink()
    save_file(tensors, whole / "model.safetensors")
    assert torch.equal(logits(opened(whole)), expected)
    names = sorted(tensors)
    halves = {
        f"pytorch_model-0000{number}-of-00002.bin": {name: tensors[name] for name in part}
        for number, part in ((1, names[:9]), (2, names[9:]))
    }
    config = original_config(parts.llm, parts.tower)
    assert torch.equal(logits(opened(write_original(tmp_path / "two", config, halves, parts.llm))), expected)


def test_a_projector_takes_its_language_model_from_base(parts: Parts, tmp_path: Path) -> None:
    config = original_config(parts.llm, "openai/a-tower-that-is-not-here")
    directory = write_original(tmp_path / "stage1", config, {"mm_projector.bin": parts.projector}, parts.llm)
    for file in directory.glob("tokenizer*"):
        file.unlink()  # the original code saves none here
    section = {"base": str(parts.llm), "tower": str(parts.tower)}
    loaded = opened(directory, **section)
    assert torch.equal(logits(loaded), logits(parts.composed))
    outline = read_outline(WholeModel(path=str(directory), **section))
    assert (outline.spec, outline.image_id, outline.style) == (loaded.spec, loaded.image_id, "llava")
    assert outline.template == loaded.template


def test_weights_of_the_tower_inside_count_before_those_it_names(parts: Parts, write: Callable[..., Path]) -> None:
    inside = "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    own_name = "vision_tower.model.encoder.layers.0.mlp.fc1.weight"
    trained = parts.composed.model.get_parameter(own_name) + 0.5
    loaded = opened(write({inside: trained}))
    assert torch.equal(loaded.model.get_parameter(own_name), trained)
    rest = "vision_tower.model.encoder.layers.1.mlp.fc1.weight"
    assert torch.equal(loaded.model.get_parameter(rest), parts.composed.model.get_parameter(rest))


def test_llava_1_0_has_one_linear_layer(parts: Parts, write: Callable[..., Path]) -> None:
    matrix, bias = torch.randn(32, 24), torch.randn(32)
    gone = dict.fromkeys(parts.projector)
    tensors = {**gone, "model.mm_projector.weight": matrix, "model.mm_projector.bias": bias}
    directory = write(tensors, mm_projector_type="linear")
    loaded = opened(directory)
    assert loaded.connector == {"type": "linear"}
    assert torch.equal(loaded.model.get_parameter("multi_modal_projector.linear_1.weight"), matrix)
    config = json.loads((directory / "config.json").read_text())
    del config["mm_projector_type"], config["image_aspect_ratio"]
    (directory / "config.json").write_text(json.dumps(config))
    assert opened(directory).spec.resize == "crop"  # square: as CLIP's own processor does


def test_pictures_stand_between_marks_where_llava_1_0_learned_it_so(parts: Parts, tmp_path: Path) -> None:
    """``mm_use_im_start_end``: two more tokens around each picture, which the tokenizer must know."""
    tokenizer: Any = AutoTokenizer.from_pretrained(parts.llm)
    tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    rows = {
        name: torch.cat([parts.language[name], torch.zeros(2, 32)])
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    config = original_config(parts.llm, parts.tower, mm_use_im_start_end=True, vocab_size=len(tokenizer))
    files = {"pytorch_model.bin": {**parts.language, **rows, **parts.projector}}
    directory = write_original(tmp_path / "v1_0", config, files, parts.llm)
    tokenizer.save_pretrained(directory)
    loaded = opened(directory)
    talk = Conversation(id="t", messages=(Message(role="user", content=(ImageRef(0), "What?")),), images=(b"",))
    assert "USER: <im_start><image><im_end>\nWhat? ASSISTANT:" in loaded.template.render(talk, reply=True).text
    save_model(loaded, None, tmp_path / "saved", made_from={})
    again = load_model(tmp_path / "saved", dtype=torch.float32)
    assert again.template.render(talk, reply=True) == loaded.template.render(talk, reply=True)


@pytest.mark.parametrize(
    ("fields", "tiling"),
    [
        (
            {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[28, 56], [56, 28]]},
            Anyres(pinpoints=((28, 56), (56, 28))),
        ),
        (
            {"image_aspect_ratio": "anyres_max_4", "image_grid_pinpoints": "(1x1),...,(2x2)"},
            Anyres(pinpoints=((28, 28), (28, 56), (56, 28), (56, 56)), shrink_to=4, several="whole"),
        ),
    ],
)
def test_tiles_of_llava_1_6_are_read_with_their_newline(
    write: Callable[..., Path], fields: dict[str, Any], tiling: Anyres
) -> None:
    newline = torch.arange(32.0)
    loaded = opened(write({"model.image_newline": newline}, mm_patch_merge_type="spatial_unpad", **fields))
    assert loaded.spec.tiling == tiling
    assert loaded.model.image_newline is not None
    assert torch.equal(loaded.model.image_newline, newline)


def test_rows_for_image_and_padding_share_no_probability(parts: Parts, write: Callable[..., Path]) -> None:
    """The original code has no such rows: the loss is that over the language model's own vocabulary."""
    loaded = opened(write())
    rows = parts.language["lm_head.weight"].shape[0]
    assert rows < loaded.model.language_model.config.vocab_size
    batch = batch_of(loaded, [[sample(loaded, text=range(40, 50), images=1, trained=5)]])
    with torch.no_grad():
        ours = loaded.model(batch)
        own = loaded.model.logits(batch)[0, :, :rows]
    expected = functional.cross_entropy(own, batch.labels[0], ignore_index=-100, reduction="sum")
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)  # fp32, another order of sums
    assert min(loaded.model.never()) == rows


def test_the_vocabulary_survives_saving(write: Callable[..., Path], tmp_path: Path) -> None:
    loaded = opened(write())
    save_model(loaded, None, tmp_path / "saved", made_from={})
    again = load_model(tmp_path / "saved", dtype=torch.float32)
    assert again.model.vocabulary == loaded.model.vocabulary is not None
    assert (again.style, again.template) == (loaded.style, loaded.template)


def test_such_a_directory_is_opened_and_not_poured_into_another_model(parts: Parts, write: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"give it as model\.path .*, not as init_from"):
        load_weights(parts.composed.model, write())


def test_the_command_line_names_base_and_tower(parts: Parts, tmp_path: Path) -> None:
    config = original_config(parts.llm, "openai/a-tower-that-is-not-here")
    directory = write_original(tmp_path / "stage1", config, {"mm_projector.bin": parts.projector}, parts.llm)
    asked = ["chat", str(directory), "--prompt", "Hello", "--max-new-tokens", "2", "--template", "llama2"]
    result = CliRunner().invoke(app, [*asked, "--base", str(parts.llm), "--tower", str(parts.tower)])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (
            {"model.mm_projector.0.weight": torch.zeros(32, 20)},
            {},
            r"of another shape: .*linear_1.weight is \[32, 20\]",
        ),
        ({"model.mm_projector.2.bias": None}, {}, r"1 missing: multi_modal_projector\.linear_2\.bias"),
        ({"model.mm_projector.4.bias": torch.zeros(32)}, {}, r"1 unexpected: multi_modal_projector\.linear_3\.bias"),
        ({}, {"mm_projector_type": "ldpnet"}, "mm_projector_type ldpnet is not known; linear and mlpNx_gelu"),
        ({}, {"s2": True}, "s2: True is not supported"),
        ({}, {"mm_resampler_type": "qformer"}, "mm_resampler_type: qformer is not supported"),
        ({}, {"model_type": "bunny-phi"}, "model_type bunny-phi is not known among LLaVA's original classes"),
        ({}, {"mm_vision_tower": "/no/such/tower"}, "there is no directory '/no/such/tower'; .*--tower"),
        (
            {},
            {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial"},
            "patch_merge_type spatial is not supp",
        ),
        ({}, {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[30, 56]]}, "is not whole tiles of 28 x 28"),
        ({}, {"vocab_size": 50}, "the tokenizer has .* tokens, the model 50 embeddings; they do not belong together"),
        ({}, {"mm_vision_select_feature": "attention"}, "one layer, and patch or cls_patch, can be read"),
    ],
)
def test_what_does_not_fit_is_named(
    write: Callable[..., Path], tensors: Tensors, config: dict[str, Any], message: str
) -> None:
    directory = write(tensors, **config)
    with pytest.raises(CheckpointError, match=message):
        opened(directory)


def test_a_projector_of_another_tower_is_named(parts: Parts, write: Callable[..., Path], tmp_path: Path) -> None:
    tower = shutil.copytree(parts.tower, tmp_path / "wider")
    config = json.loads((tower / "config.json").read_text())
    (tower / "config.json").write_text(json.dumps({**config, "hidden_size": 48}))
    with pytest.raises(CheckpointError, match=r"linear_1\.weight is \[32, 24\], needed is \[32, 48\]"):
        opened(write(), tower=str(tower))


def test_base_is_asked_for_and_refused_where_it_has_no_meaning(
    parts: Parts, write: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="holds its own language model; leave out base"):
        opened(write(), base=str(parts.llm))
    config = original_config(parts.llm, parts.tower, _name_or_path="lmsys/vicuna-7b-v1.5")
    stage1 = write_original(tmp_path / "stage1", config, {"mm_projector.bin": parts.projector}, parts.llm)
    with pytest.raises(CheckpointError, match=r"\(lmsys/vicuna-7b-v1.5\); give that model as base .*--base"):
        opened(stage1)
    (stage1 / "mm_projector.bin").unlink()
    with pytest.raises(CheckpointError, match=r"holds no weights: pytorch_model\.bin"):
        opened(stage1)
    save_model(parts.composed, None, tmp_path / "whole", made_from={})
    with pytest.raises(ConfigError, match=r"is whole .*; leave out base and tower"):
        opened(tmp_path / "whole", tower=str(parts.tower))
