"""Models with each kind of encoder as directories: open in transformers where it has the class, and here always."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_factories import tiny_clip_dir, tiny_dino_dir, tiny_llm_dir, tiny_open_clip, tiny_siglip_dir
from models_support import batch_of, sample
from PIL import Image
from test_fused_towers import custom
from tiny_timm import open_clip_with, weights_of
from torch import Tensor
from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

from mmit.config import ComposedModel
from mmit.errors import CheckpointError
from mmit.images import normalize
from mmit.models import LoadedModel, build_model, load_model, load_weights, save_model


def timm_section(name: str, folder: Path) -> dict[str, Any]:
    import timm

    return {"type": "timm", "name": name, "pretrained": str(weights_of(timm.create_model(name), folder / "timm.pt"))}


def hub(path: Path, **fields: object) -> dict[str, Any]:
    return {"type": "transformers", "path": str(path), **fields}


Make = Callable[[Path], Any]
IN_LLAVA: dict[str, Make] = {
    "dinov2": lambda folder: hub(tiny_dino_dir(folder, "dinov2")),
    "dinov2 with its class token": lambda folder: hub(tiny_dino_dir(folder, "dinov2"), cls="keep"),
    "clip, three layers": lambda folder: hub(tiny_clip_dir(folder), layer=[-2, 1, -1]),
    "clip, larger": lambda folder: hub(tiny_clip_dir(folder), image_size=56),
    "dinov2, larger": lambda folder: hub(tiny_dino_dir(folder, "dinov2"), image_size=42, layer=[-1, -3]),
    "siglip of timm": lambda folder: timm_section("tiny_siglip", folder),
    "siglip of open_clip": lambda folder: open_clip_with("tiny_siglip", folder) | {"image_size": 56},
    "dinov2 of timm": lambda folder: timm_section("tiny_dinov2", folder),
    "open_clip, larger, two layers": lambda folder: tiny_open_clip(folder) | {"image_size": 42, "layer": [-1, 1]},
}
IN_OWN: dict[str, tuple[Make, str]] = {
    "dinov2 with registers": (
        lambda folder: hub(tiny_dino_dir(folder, "dinov2_with_registers")),
        "its classes take the 2 register tokens of the encoder for patches",
    ),
    "dinov3": (lambda folder: hub(tiny_dino_dir(folder, "dinov3_vit"), image_size=56), "register tokens"),
    "eva of timm": (lambda folder: timm_section("tiny_eva", folder), "no class for the encoder TimmTower"),
    "eva of open_clip": (
        lambda folder: open_clip_with("tiny_eva", folder) | {"image_size": 42, "layer": [-1, 1], "cls": "keep"},
        "no class for the encoder TimmTower",
    ),
    "several": (
        lambda folder: [
            hub(tiny_clip_dir(folder / "clip"), layer=[-2, 1], resize="crop"),
            hub(tiny_siglip_dir(folder / "siglip"), image_size=56, resize="squash"),
            timm_section("tiny_registers", folder),
            custom(3),
        ],
        "LLaVA classes have one encoder, this model has 4",
    ),
}


def saved(make: Make, folder: Path) -> tuple[LoadedModel, Path]:
    """A model with this encoder, and its directory; the parts that it was made from are gone."""
    parts = folder / "parts"
    parts.mkdir()
    section = ComposedModel.model_validate(
        {"encoder": make(parts), "language_model": {"path": str(tiny_llm_dir(folder / "llm")), "template": "vicuna"}}
    )
    loaded = build_model(section, dtype=torch.float32, seed=5)
    save_model(loaded, None, folder / "model", made_from={})
    shutil.rmtree(parts)
    return loaded, folder / "model"


@torch.no_grad()
def logits(loaded: LoadedModel) -> Tensor:
    return loaded.model.logits(batch_of(loaded, [[sample(loaded, text=range(40, 50), images=2, trained=3)]]))


def own(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "mmit.json").read_text())


@pytest.mark.parametrize("kind", IN_LLAVA)
@torch.no_grad()
def test_transformers_opens_it_with_the_same_logits(kind: str, tmp_path: Path) -> None:
    ours, directory = saved(IN_LLAVA[kind], tmp_path)
    assert own(directory)["layout"] == "llava"
    reader: Any = LlavaForConditionalGeneration
    theirs, report = reader.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    batch = batch_of(ours, [[sample(ours, text=range(40, 50), images=2, trained=3)]])
    pixels = normalize(batch.pixels, ours.spec)
    mine = ours.model.logits(batch)
    # fp32; open_clip's joined q, k, v rounds in another order
    torch.testing.assert_close(
        mine, theirs.eval()(input_ids=batch.input_ids, pixel_values=pixels).logits, rtol=0, atol=5e-6
    )
    processor = AutoProcessor.from_pretrained(directory)
    inputs = processor(images=Image.new("RGB", (50, 80)), text="What? <image> Say.", return_tensors="pt")
    assert int((inputs["input_ids"] == ours.image_id).sum()) == ours.spec.tokens_per_tile
    assert inputs["pixel_values"].shape == pixels[:1].shape
    again = load_model(directory, dtype=torch.float32)
    torch.testing.assert_close(logits(again), mine, rtol=0, atol=5e-6)
    assert again.spec == ours.spec


@pytest.mark.parametrize("kind", IN_OWN)
def test_what_transformers_cannot_hold_opens_here_without_its_origin(kind: str, tmp_path: Path) -> None:
    make, because = IN_OWN[kind]
    ours, directory = saved(make, tmp_path)
    assert own(directory)["layout"] == "own"
    assert because in own(directory)["not_llava_because"]
    opened = load_model(directory, dtype=torch.float32)
    assert torch.equal(logits(opened), logits(ours))
    assert opened.spec == ours.spec
    save_model(opened, None, tmp_path / "again", made_from={})
    third = load_model(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits(third), logits(ours))
    for parameter in opened.model.parameters():
        parameter.data.zero_()
    load_weights(opened.model, directory)
    assert torch.equal(logits(opened), logits(ours))


def test_a_directory_that_reads_its_encoders_elsewhere_is_refused(tmp_path: Path) -> None:
    ours, directory = saved(IN_OWN["several"][0], tmp_path)
    description = own(directory)
    for number, key, value, message in (
        (0, "layer", [-2, -1], r"layer \[-2, -1\] \(default\), the run file at layer \[-2, -3\] \(default\)"),
        (2, "cls", "keep", r"layer -2 \(full\), the run file at layer -2 \(default\)"),
    ):
        towers = [dict(tower) for tower in description["towers"]]
        towers[number][key] = value
        (directory / "mmit.json").write_text(json.dumps(description | {"towers": towers}))
        with pytest.raises(CheckpointError, match=message):
            load_weights(ours.model, directory)
    (directory / "mmit.json").write_text(json.dumps(description | {"towers": description["towers"][:2]}))
    with pytest.raises(CheckpointError, match="has 2 encoders, the run file 4"):
        load_weights(ours.model, directory)


def test_layers_behind_those_that_are_read_are_trained_in_no_encoder(tmp_path: Path) -> None:
    ours, _ = saved(IN_OWN["several"][0], tmp_path)
    (group,) = ours.model.train_only({"vision_tower": 1e-6})
    layers = {".".join(name.split(".")[1:7]) for name in group.names}
    assert any(name.startswith("towers.0.model.encoder.layers.1") for name in layers)
    assert not any("layers.2" in name or "blocks.2" in name for name in layers)
    assert "vision_tower.towers.3.scale" in group.names


def test_a_directory_of_transformers_with_registers_is_refused(tmp_path: Path) -> None:
    """transformers would hand the registers to the language model."""
    _, directory = saved(IN_OWN["dinov3"][0], tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "llava"}))
    (directory / "mmit.json").unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read as transformers does: .* 2 register tokens"):
        load_model(directory, dtype=torch.float32)


def test_dinov2_is_read_in_the_names_that_transformers_has_in_memory(tmp_path: Path) -> None:
    ours, directory = saved(IN_LLAVA["dinov2"], tmp_path)
    theirs: Any = LlavaForConditionalGeneration.from_pretrained(directory)
    assert isinstance(theirs.config, LlavaConfig)
    theirs.save_pretrained(tmp_path / "native", save_original_format=False)
    for file in directory.iterdir():
        if not (tmp_path / "native" / file.name).exists():
            shutil.copy(file, tmp_path / "native")
    assert torch.equal(logits(load_model(tmp_path / "native", dtype=torch.float32)), logits(ours))


def test_an_open_clip_tower_in_the_form_of_the_first_version_opens(tmp_path: Path) -> None:
    """mmit 0.1 kept the architecture in open_clip_config.json."""
    import open_clip

    def layerscale(folder: Path) -> dict[str, Any]:
        described = tiny_open_clip(folder)
        content = json.loads(Path(described["name"]).read_text())
        content["vision_cfg"]["ls_init_value"] = 0.5
        file = folder / "tiny-layerscale-old.json"
        file.write_text(json.dumps(content))
        open_clip.add_model_config(str(file))
        torch.save(open_clip.create_model(file.stem).state_dict(), folder / "weights.pt")
        return described | {"name": str(file), "pretrained": str(folder / "weights.pt")}

    ours, directory = saved(layerscale, tmp_path)
    description = own(directory)
    (tower,) = description.pop("towers")
    (directory / "mmit.json").write_text(json.dumps(description))
    old = {"model_cfg": tower["config"], "preprocess_cfg": tower["image"]}
    (directory / "open_clip_config.json").write_text(json.dumps(old))
    assert torch.equal(logits(load_model(directory, dtype=torch.float32)), logits(ours))
