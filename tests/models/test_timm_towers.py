"""Towers of timm, by name or inside an open_clip model: timm's features, in transformers' class where it has one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from pydantic import TypeAdapter
from tiny_timm import open_clip_with, weights_of
from torch import Tensor, nn
from transformers import CLIPVisionModel, Dinov2Model, SiglipVisionModel

from mmit.config import Encoder
from mmit.errors import ConfigError
from mmit.models.encoders import ImageInput, TransformersTower, build_encoder
from mmit.models.encoders.open_clip_towers import has_quick_gelu
from mmit.models.encoders.timm_towers import TimmTower

PIXELS = torch.randn((2, 3, 28, 28), generator=torch.Generator().manual_seed(0))
RENAMED = {"tiny_siglip": SiglipVisionModel, "tiny_clip": CLIPVisionModel, "tiny_dinov2": Dinov2Model}
OTHERS = ("tiny_registers", "tiny_plain", "tiny_eva")


def built(section: dict[str, Any], *, dtype: torch.dtype = torch.float32) -> Any:
    return build_encoder(TypeAdapter(Encoder).validate_python(section), dtype=dtype)


def section(name: str, folder: Path, **fields: object) -> dict[str, Any]:
    file = folder / f"{name}.pt"
    if not file.is_file():
        weights_of(timm.create_model(name), file)
    return {"type": "timm", "name": name, "pretrained": str(file), **fields}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("timm")


def states_of_timm(name: str, folder: Path, pixels: Tensor = PIXELS, **arguments: Any) -> list[tuple[Tensor, Tensor]]:
    """Class token (empty where there is none) and patches behind each block, by timm."""
    model: Any = timm.create_model(name)
    model.load_state_dict(torch.load(section(name, folder)["pretrained"], weights_only=True))
    if arguments:
        model.set_input_size(**arguments)
    has_prefix = model.num_prefix_tokens > 0
    found = model.eval().forward_intermediates(
        pixels, return_prefix_tokens=has_prefix, output_fmt="NLC", intermediates_only=True
    )
    return [(state[1][:, :1], state[0]) if has_prefix else (state[:, :0], state) for state in found]


@pytest.mark.parametrize("name", [*RENAMED, *OTHERS])
@torch.no_grad()
def test_the_features_are_those_of_timms_blocks(name: str, folder: Path) -> None:
    expected = states_of_timm(name, folder)
    for layer, cls in ((-1, "drop"), (-2, "keep"), (1, "keep"), ([-1, 1], "drop"), ([1, -2, 1], "keep")):
        tower = built(section(name, folder, layer=layer, cls=cls))
        wanted = []
        for number in layer if isinstance(layer, list) else [layer]:
            first, patches = expected[number - 1 if number > 0 else number]
            wanted.append(torch.cat([first, patches], dim=1) if cls == "keep" else patches)
        features = tower(PIXELS)
        # fp32, the same sums; a class of transformers has q, k and v apart
        torch.testing.assert_close(features, torch.cat(wanted, dim=-1), rtol=0, atol=5e-6)
        assert features.shape == (2, tower.patches, tower.width)
        assert tower.image == ImageInput(size=(28, 28), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


@pytest.mark.parametrize("name", RENAMED)
def test_a_tower_that_transformers_has_a_class_for_becomes_that_class(name: str, folder: Path) -> None:
    for described in (section(name, folder), open_clip_with(name, folder)):
        tower = built(described)
        assert isinstance(tower, TransformersTower)
        assert isinstance(tower.model, RENAMED[name])


@pytest.mark.parametrize("name", OTHERS)
def test_other_towers_stay_timms(name: str, folder: Path) -> None:
    assert isinstance(built(section(name, folder)), TimmTower)
    tower = built(open_clip_with(name, folder))
    assert isinstance(tower, TimmTower)
    assert tower.image.size == (28, 28)


@pytest.mark.parametrize("name", ["tiny_siglip", "tiny_eva"])
@torch.no_grad()
def test_open_clips_tower_is_the_one_of_its_weights(name: str, folder: Path) -> None:
    described = open_clip_with(name, folder)
    model: Any = timm.create_model(name)
    stored = torch.load(described["pretrained"], weights_only=True)
    trunk = {
        key.removeprefix("visual.trunk."): value for key, value in stored.items() if key.startswith("visual.trunk.")
    }
    model.load_state_dict(trunk, strict=False)
    expected = model.eval().forward_intermediates(PIXELS, indices=[1], output_fmt="NLC", intermediates_only=True)[0]
    torch.testing.assert_close(built(described)(PIXELS), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", ["tiny_siglip", "tiny_clip", "tiny_registers", "tiny_eva"])
@torch.no_grad()
def test_another_input_size_has_timms_position_embeddings(name: str, folder: Path) -> None:
    pixels = torch.randn((1, 3, 56, 56), generator=torch.Generator().manual_seed(1))
    (_, expected) = states_of_timm(name, folder, pixels, img_size=(56, 56))[1]
    tower = built(section(name, folder, image_size=56))
    assert (tower.patches, tower.image.size) == (16, (56, 56))
    torch.testing.assert_close(tower(pixels), expected, rtol=0, atol=5e-6)


def test_bf16_keeps_the_angles_of_rotary_embeddings_in_fp32(folder: Path) -> None:
    tower = built(section("tiny_eva", folder), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for name, buffer in tower.named_buffers() if "rope" in name} == {torch.float32}
    assert tower(PIXELS.bfloat16()).dtype == torch.bfloat16


def test_gradients_reach_the_layers_that_are_read_and_no_others(folder: Path) -> None:
    tower: nn.Module = built(section("tiny_eva", folder))
    tower(PIXELS).sum().backward()
    reached = {name for name, parameter in tower.named_parameters() if parameter.grad is not None}
    assert any("blocks.1." in name for name in reached)
    assert not any("blocks.2." in name for name in reached)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "no_such_vit"}, "timm has no model 'no_such_vit'"),
        ({"pretrained": "nowhere.pt"}, r"there is no file nowhere\.pt; true takes the weights that timm has"),
        ({"pretrained": True}, "timm cannot make 'tiny_eva' with its weights: No pretrained weights"),
        ({"layer": 0}, "timm does not give the embeddings"),
        ({"layer": [1, 9]}, "9 does not exist in an encoder of 3 layers; take -4 to 3"),
        ({"image_size": 30}, "30 is no multiple of the patch size 14; take 28 or 42"),
    ],
)
def test_what_timm_cannot_give_is_named(fields: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        built(section("tiny_eva", folder) | fields)


def test_a_weight_file_must_fit(folder: Path, tmp_path: Path) -> None:
    for content, message in (
        ({"blocks.0.norm1.weight": torch.ones(24)}, r"lacks \d+ tensors of the tower"),
        ({"blocks.0.norm1.weight": torch.ones(7)}, "does not fit Eva"),
        ({"blocks": print}, "no weight file that can be read safely"),
    ):
        torch.save(content, tmp_path / "weights.pt")
        with pytest.raises(ConfigError, match=message):
            built(section("tiny_eva", folder) | {"pretrained": str(tmp_path / "weights.pt")})


def test_networks_without_a_row_of_patch_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ResNet of timm has no row of layers with one feature for each patch"):
        built({"type": "timm", "name": "test_resnet", "pretrained": str(tmp_path / "none.pt")})


def test_openai_weights_have_their_activation_whatever_the_name_says() -> None:
    """open_clip only warns: ViT-L-14-336 is plain GELU there, OpenAI's weights were trained with QuickGELU."""
    assert has_quick_gelu("ViT-L-14-336", "openai")
    assert has_quick_gelu("ViT-L-14-336-quickgelu", "openai")
    assert not has_quick_gelu("ViT-B-32", "laion2b_s34b_b79k")
