"""Model directories: names on disk, round trips to the bit, all or nothing."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models_support import batch_of, files_of, sample
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from mmit.config import ComposedModel
from mmit.errors import CheckpointError, MmitError
from mmit.models import LoadedModel, build_model, load_model, load_weights, save_model, tensor_file, weight_files
from mmit.models import save as save_module
from mmit.models.encoders import TransformersTower
from mmit.models.hub_files import text_config

Build = Callable[..., LoadedModel]


def saved(loaded: LoadedModel, directory: Path) -> Path:
    save_model(loaded, None, directory, made_from={"run": "test"})
    return directory


def stored_names(directory: Path) -> set[str]:
    names: set[str] = set()
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            names |= set(handle.keys())
    return names


def read(directory: Path, name: str) -> dict[str, Any]:
    return json.loads((directory / name).read_text())


def logits(loaded: LoadedModel) -> Tensor:
    with torch.no_grad():
        return loaded.model.logits(batch_of(loaded, [[sample(loaded, text=range(40, 50), images=2, trained=3)]]))


def test_the_directory_holds_all_files_and_the_hubs_names(loaded: LoadedModel, tmp_path: Path) -> None:
    directory = saved(loaded, tmp_path / "model")
    assert {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "mmit.json",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    } == files_of(directory)
    names = stored_names(directory)
    assert {
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.1.self_attn.q_proj.weight",
        "multi_modal_projector.linear_1.weight",
        "multi_modal_projector.linear_2.bias",
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
        "vision_tower.vision_model.encoder.layers.2.self_attn.q_proj.bias",
        "vision_tower.vision_model.post_layernorm.weight",
    } <= names
    prefixes = ("language_model.", "multi_modal_projector.linear_", "vision_tower.vision_model.")
    assert all(name.startswith(prefixes) for name in names)
    is_tied = loaded.model.language_model.config.tie_word_embeddings
    assert ("language_model.lm_head.weight" in names) != is_tied


def test_a_round_trip_keeps_every_bit(loaded: LoadedModel, build: Build, tmp_path: Path) -> None:
    directory = saved(loaded, tmp_path / "model")
    opened = load_model(directory, dtype=torch.float32)
    # a tower of open_clip comes back as the CLIPVisionModel that it is equal to, up to the order of sums
    torch.testing.assert_close(logits(opened), logits(loaded), rtol=0, atol=5e-6)
    assert opened.model.spec == loaded.model.spec
    assert (opened.image_id, opened.pad_id, opened.style) == (loaded.image_id, loaded.pad_id, loaded.style)
    assert opened.template == loaded.template
    text = "USER: What is it? <image> ASSISTANT:"
    assert opened.tokenizer(text).input_ids == loaded.tokenizer(text).input_ids
    again = saved(opened, tmp_path / "again")
    for name in ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"):
        if name != "config.json" or isinstance(loaded.model.vision_tower, TransformersTower):
            assert read(again, name) == read(directory, name)
    with safe_open(directory / "model.safetensors", "pt") as one, safe_open(again / "model.safetensors", "pt") as two:
        assert set(one.keys()) == set(two.keys())
        assert all(torch.equal(one.get_tensor(name), two.get_tensor(name)) for name in set(one.keys()))


def test_a_stage_continues_with_the_weights_of_another(loaded: LoadedModel, build: Build, tmp_path: Path) -> None:
    directory = saved(loaded, tmp_path / "model")
    kind = {"siglip": "siglip_qwen2", "clip": "clip_llama"}.get(
        Path(str(loaded.encoder.get("path", "open"))).name, "open_clip_llama"
    )
    fresh = build(kind, seed=11)
    assert not torch.equal(logits(fresh), logits(loaded))
    load_weights(fresh.model, directory)
    assert torch.equal(logits(fresh), logits(loaded))  # an open_clip tower is joined again, to the bit
    head = fresh.model.language_model.get_output_embeddings().weight
    is_tied = loaded.model.language_model.config.tie_word_embeddings
    assert (head is fresh.model.language_model.get_input_embeddings().weight) == is_tied


def test_a_gathered_state_is_written_in_place_of_the_models_own(build: Build, tmp_path: Path) -> None:
    loaded = build("siglip_qwen2")
    state = {name: tensor.clone() + 1 for name, tensor in loaded.model.state_dict().items()}
    save_model(loaded, state, tmp_path / "model", made_from={})
    opened = load_model(tmp_path / "model", dtype=torch.float32)
    name = "multi_modal_projector.linear_1.weight"
    assert torch.equal(opened.model.get_parameter(name), loaded.model.get_parameter(name) + 1)


def test_configuration_is_readable_by_transformers_4_and_5(build: Build, tmp_path: Path) -> None:
    directory = saved(build(), tmp_path / "model")
    config = read(directory, "config.json")
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["torch_dtype"] == "float32"
    assert config["text_config"]["rope_theta"] == 50000.0
    assert config["text_config"]["rope_parameters"]["rope_theta"] == 50000.0
    assert config["vision_feature_layer"] == -2
    assert config["vision_feature_select_strategy"] == "default"
    assert read(directory, "tokenizer_config.json")["legacy"] is False
    processor = read(directory, "preprocessor_config.json")
    assert (processor["image_processor_type"], processor["do_pad"]) == ("LlavaImageProcessor", True)
    assert read(directory, "processor_config.json")["num_additional_image_tokens"] == 1
    assert read(directory, "generation_config.json") == {
        "eos_token_id": [2],
        "pad_token_id": config["pad_token_id"],
        "bos_token_id": 1,
    }


def test_the_end_of_a_turn_ends_generation(build: Build, tmp_path: Path) -> None:
    loaded = build("siglip_qwen2")
    directory = saved(loaded, tmp_path / "model")
    end = loaded.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in read(directory, "generation_config.json")["eos_token_id"]
    assert read(directory, "preprocessor_config.json")["image_processor_type"] == "SiglipImageProcessor"
    assert read(directory, "config.json")["vision_feature_select_strategy"] == "full"


def test_scaled_rotary_embeddings_survive_in_both_spellings() -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    config.rope_parameters = rope
    written = text_config(AutoModelForCausalLM.from_config(config), dtype=torch.float32)
    assert written["rope_theta"] == 5e5
    assert written["rope_scaling"] == {name: value for name, value in rope.items() if name != "rope_theta"}
    kind = written.pop("model_type")
    assert AutoConfig.for_model(kind, **written).rope_parameters == rope


def test_weights_beyond_the_limit_are_split_over_files(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_files, "SHARD_BYTES", 100_000)
    loaded = build()
    directory = saved(loaded, tmp_path / "model")
    index = read(directory, "model.safetensors.index.json")
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 1
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert torch.equal(logits(load_model(directory, dtype=torch.float32)), logits(loaded))
    (directory / shards[1]).unlink()
    with pytest.raises(CheckpointError, match=f"{re.escape(shards[1])} is missing"):
        load_model(directory, dtype=torch.float32)


def test_a_full_disk_leaves_the_old_directory_and_nothing_else(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = build()
    directory = saved(loaded, tmp_path / "model")
    before = (directory / "mmit.json").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_file.os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"cannot write the model to .*: No space left on device"):
        save_model(loaded, None, directory, made_from={"run": "second"})
    assert (directory / "mmit.json").read_bytes() == before
    assert files_of(tmp_path) == {"model"}


def test_ctrl_c_while_writing_leaves_nothing(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(save_module, "take_place", interrupted)
    with pytest.raises(KeyboardInterrupt):
        saved(build(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_new_model_takes_the_place_of_the_old(build: Build, tmp_path: Path) -> None:
    loaded = build()
    directory = saved(loaded, tmp_path / "model")
    (directory / "stray.txt").touch()
    save_model(loaded, None, directory, made_from={"run": "second"})
    assert read(directory, "mmit.json")["made_from"] == {"run": "second"}
    assert "stray.txt" not in files_of(directory)
    assert files_of(tmp_path) == {"model"}


class MeanConnector(nn.Module):
    """All patches of a tile in one token."""

    def __init__(self, *, width_in: int, width_out: int) -> None:
        super().__init__()
        self.width_in, self.width_out = width_in, width_out
        self.map = nn.Linear(width_in, width_out)

    def tokens(self, patches: int) -> int:
        return 1

    def forward(self, patches: Tensor) -> Tensor:
        return self.map(patches.mean(dim=1, keepdim=True))


@pytest.mark.parametrize(
    ("kind", "connector", "because"),
    [
        ("clip_llama", {"type": "linear"}, "exactly two linear layers"),
        ("open_clip_llama", {"type": "mlp", "depth": 3}, "exactly two linear layers"),
        ("siglip_qwen2", {"type": f"{__name__}:MeanConnector"}, "this connector is MeanConnector"),
    ],
)
def test_what_llava_cannot_hold_is_saved_in_mmits_own_layout_and_says_so(
    sections: dict[str, ComposedModel], tmp_path: Path, kind: str, connector: dict[str, Any], because: str
) -> None:
    section = ComposedModel.model_validate({**sections[kind].model_dump(), "connector": connector})
    loaded = build_model(section, dtype=torch.float32, seed=1)
    directory = saved(loaded, tmp_path / "model")
    own = read(directory, "mmit.json")
    assert own["layout"] == "own"
    assert because in own["not_llava_because"]
    assert read(directory, "config.json")["model_type"] == "mmit"
    opened = load_model(directory, dtype=torch.float32)
    torch.testing.assert_close(logits(opened), logits(loaded), rtol=0, atol=5e-6)
    assert opened.connector["type"] == connector["type"]


def test_an_open_clip_tower_without_a_twin_in_transformers_keeps_its_names(
    sections: dict[str, ComposedModel], tmp_path: Path
) -> None:
    """LayerScale: CLIPVisionModel has none."""
    import open_clip

    encoder = sections["open_clip_llama"].model_dump()["encoder"]
    description = json.loads(Path(encoder["name"]).read_text())
    description["vision_cfg"]["ls_init_value"] = 0.5
    name = tmp_path / "tiny-layerscale.json"
    name.write_text(json.dumps(description))
    open_clip.add_model_config(str(name))
    torch.save(open_clip.create_model("tiny-layerscale").state_dict(), tmp_path / "weights.pt")
    encoder |= {"name": str(name), "pretrained": str(tmp_path / "weights.pt")}
    section = ComposedModel.model_validate({**sections["open_clip_llama"].model_dump(), "encoder": encoder})
    loaded = build_model(section, dtype=torch.float32, seed=1)
    directory = saved(loaded, tmp_path / "model")
    assert "vision_tower.model.transformer.resblocks.0.ls_1.gamma" in stored_names(directory)
    assert "no class for the encoder OpenClipTower" in read(directory, "mmit.json")["not_llava_because"]
    assert torch.equal(logits(load_model(directory, dtype=torch.float32)), logits(loaded))


def test_a_directory_that_reads_the_encoder_elsewhere_is_refused(
    build: Build, sections: dict[str, ComposedModel], tmp_path: Path
) -> None:
    directory = saved(build(), tmp_path / "model")
    section = sections["clip_llama"].model_dump()
    section["encoder"]["layer"] = -1
    other = build_model(ComposedModel.model_validate(section), dtype=torch.float32, seed=1)
    with pytest.raises(CheckpointError, match=r"layer -2 \(default\), the run file at layer -1 \(default\)"):
        load_weights(other.model, directory)


@pytest.mark.parametrize(
    ("file", "keys", "value"),
    [
        ("config.json", ("text_config", "hidden_size"), "32"),
        ("config.json", ("text_config", "hidden_size"), 10**12),
        ("config.json", ("text_config", "num_hidden_layers"), 2.5),
        ("config.json", ("vision_config", "patch_size"), 0),
        ("mmit.json", ("connector",), "mlp"),
        ("mmit.json", ("images",), 5),
    ],
)
def test_an_impossible_description_is_one_sentence(
    loaded: LoadedModel, tmp_path: Path, file: str, keys: tuple[str, ...], value: object
) -> None:
    directory = saved(loaded, tmp_path / "model")
    content = read(directory, file)
    place = content[keys[0]] if len(keys) > 1 else content
    place[keys[-1]] = value
    (directory / file).write_text(json.dumps(content))
    with pytest.raises(MmitError, match=r"describes parts that cannot be built|cannot be loaded: Validation error"):
        load_model(directory, dtype=torch.float32)


def test_bf16_is_written_as_bf16(sections: dict[str, ComposedModel], tmp_path: Path) -> None:
    loaded = build_model(sections["clip_llama"], dtype=torch.bfloat16, seed=1)
    directory = saved(loaded, tmp_path / "model")
    assert read(directory, "config.json")["torch_dtype"] == "bfloat16"
    with safe_open(directory / "model.safetensors", "pt") as handle:
        assert {handle.get_tensor(name).dtype for name in set(handle.keys())} == {torch.bfloat16}
    opened = load_model(directory, dtype=torch.bfloat16)
    assert torch.equal(logits(opened), logits(loaded))
