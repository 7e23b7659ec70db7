"""Towers of transformers beyond CLIP and SigLIP at one layer: DINO, several layers, another input size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import open_clip
import pytest
import torch
from model_factories import tiny_clip_dir, tiny_dino_dir, tiny_open_clip, tiny_siglip_dir
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    PreTrainedConfig,
    Siglip2VisionConfig,
    SiglipVisionConfig,
)

from mmit.config import OpenClipEncoder, TransformersEncoder
from mmit.errors import ConfigError
from mmit.models.encoders import ImageInput, TransformersTower, build_encoder
from mmit.models.encoders.positions import resample_positions

PIXELS = torch.randn((2, 3, 28, 28), generator=torch.Generator().manual_seed(0))
SIZES: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3} | {
    "image_size": 28,
    "patch_size": 14,
}
DINO: tuple[Literal["dinov2", "dinov2_with_registers", "dinov3_vit"], ...] = (
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("towers")
    made = {kind: tiny_dino_dir(folder / kind, kind) for kind in DINO}
    return {**made, "clip": tiny_clip_dir(folder / "clip"), "siglip": tiny_siglip_dir(folder / "siglip")}


def tower(path: Path, **fields: object) -> TransformersTower:
    made = build_encoder(TransformersEncoder.model_validate({"path": str(path), **fields}), dtype=torch.float32)
    assert isinstance(made, TransformersTower)
    return made


def states(made: TransformersTower, pixels: Tensor = PIXELS) -> tuple[Tensor, ...]:
    model: Any = made.model
    return model(pixels, output_hidden_states=True).hidden_states


@pytest.mark.parametrize("kind", DINO)
@pytest.mark.parametrize("layer", [-1, -2, 0])
@torch.no_grad()
def test_dino_is_read_at_the_layer_of_transformers_and_registers_are_dropped(
    paths: dict[str, Path], kind: str, layer: int
) -> None:
    made = tower(paths[kind], layer=layer)
    expected = states(made)[layer]
    assert expected.shape[1] == 4 + 1 + (0 if kind == "dinov2" else 2)
    assert torch.equal(made(PIXELS), expected[:, -4:])
    kept = tower(paths[kind], layer=layer, cls="keep")
    assert torch.equal(kept(PIXELS), torch.cat([expected[:, :1], expected[:, -4:]], dim=1))
    assert (made.patches, kept.patches, made.width) == (4, 5, 24)
    assert (made.image.mean, made.image.std) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov3_vit"])
@torch.no_grad()
def test_several_layers_stand_side_by_side_in_the_order_given(paths: dict[str, Path], kind: str) -> None:
    made = tower(paths[kind], layer=[-2, 0, 3, -2])
    expected = [states(made)[layer][:, -4:] for layer in (-2, 0, 3, -2)]
    assert made.width == 4 * 24
    assert torch.equal(made(PIXELS), torch.cat(expected, dim=-1))


@torch.no_grad()
def test_several_layers_of_open_clip_are_those_read_one_by_one(tmp_path: Path) -> None:
    described = tiny_open_clip(tmp_path)
    for cls in ("drop", "keep"):
        several, *single = (
            build_encoder(
                OpenClipEncoder.model_validate({**described, "layer": layer, "cls": cls}), dtype=torch.float32
            )
            for layer in ([-1, 1, -2], -1, 1, -2)
        )
        assert torch.equal(several(PIXELS), torch.cat([one(PIXELS) for one in single], dim=-1))


@pytest.mark.parametrize("kind", ["clip", "siglip", *DINO])
@torch.no_grad()
def test_another_input_size_leaves_all_but_the_position_embeddings(paths: dict[str, Path], kind: str) -> None:
    before, after = tower(paths[kind]), tower(paths[kind], image_size=56)
    assert (after.patches, after.image.size) == (16, (56, 56))
    changed = {
        name
        for (name, old), (_, new) in zip(before.named_parameters(), after.named_parameters(), strict=True)
        if old.shape != new.shape or not torch.equal(old, new)
    }
    assert changed == ({f"model.{after.family.positions}"} if after.family.positions else set())
    pixels = torch.randn((1, 3, 56, 56), generator=torch.Generator().manual_seed(1))
    assert torch.equal(after(pixels), states(after, pixels)[-2][:, -16:])
    assert after(pixels).isfinite().all()


@pytest.mark.parametrize(
    "config",
    [
        CLIPVisionConfig(**SIZES, intermediate_size=48),
        SiglipVisionConfig(**SIZES, intermediate_size=48, vision_use_head=False),
        Dinov2Config(**SIZES),
        Dinov2WithRegistersConfig(**SIZES),
        DINOv3ViTConfig(**SIZES, intermediate_size=48, use_gated_mlp=True),
    ],
    ids=lambda config: config.model_type,
)
def test_names_on_disk_are_those_that_transformers_writes(config: PreTrainedConfig, tmp_path: Path) -> None:
    image = ImageInput(size=(28, 28), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    made = TransformersTower(AutoModel.from_config(config), layer=-2, cls="drop", image=image)
    made.model.save_pretrained(tmp_path)
    form = made.hub_form()
    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        written = set(stored.keys())
    ours = {form.on_disk(name)[0] for name, _ in made.model.named_parameters()}
    assert {name.removeprefix("vision_model.") for name in written} == ours
    assert {form.also_read(name) for name in ours} == ours


def test_a_gated_dinov2_is_kept_in_mmits_layout() -> None:
    """transformers writes its two projections as one tensor; DINOv2 giant is the only one of its kind."""
    image = ImageInput(size=(28, 28), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    model = AutoModel.from_config(Dinov2Config(**SIZES, use_swiglu_ffn=True))
    made = TransformersTower(model, layer=-1, cls="drop", image=image)
    assert "gated layers of this DINOv2" in str(made.hub_form().why_not_llava)
    with torch.no_grad():
        assert torch.equal(made(PIXELS), states(made)[-1][:, 1:])


@torch.no_grad()
def test_positions_are_resampled_as_open_clip_does(tmp_path: Path) -> None:
    described = tiny_open_clip(tmp_path)
    section = OpenClipEncoder.model_validate({**described, "layer": -1, "image_size": 84})
    ours = build_encoder(section, dtype=torch.float32)
    model: Any = open_clip.create_model(
        Path(described["name"]).stem, pretrained=described["pretrained"], force_image_size=84
    )
    theirs = model.visual.eval()
    pixels = torch.randn((1, 3, 84, 84), generator=torch.Generator().manual_seed(1))
    expected = theirs.transformer(theirs._embeds(pixels))[:, 1:]
    torch.testing.assert_close(ours(pixels), expected, rtol=0, atol=1e-6)  # fp32, the same operations


def test_resampling_keeps_a_constant_and_the_class_token() -> None:
    table = torch.cat([torch.full((1, 2), 9.0), torch.ones(9, 2)])
    made = resample_positions(table, prefix=1, grid=(5, 7))
    assert made.shape == (36, 2)
    assert torch.equal(made[:1], table[:1])
    torch.testing.assert_close(made[1:], torch.ones(35, 2))
    assert resample_positions(table, prefix=1, grid=(3, 3)) is table


def test_an_input_size_without_whole_patches_is_refused(paths: dict[str, Path]) -> None:
    for size, message in ((60, "60 is no multiple of the patch size 14; take 56 or 70"), (5, r"14; take 14$")):
        with pytest.raises(ConfigError, match=message):
            tower(paths["siglip"], image_size=size)


def test_siglip2_of_variable_shape_is_refused(tmp_path: Path) -> None:
    Siglip2VisionConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="SigLIP 2 of variable shape"):
        tower(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["model_type"] == "siglip2_vision_model"
