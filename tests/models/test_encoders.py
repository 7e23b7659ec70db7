"""Towers read the hidden state that transformers would give, and say what a picture must look like."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from model_factories import OPENAI_MEAN, OPENAI_STD, tiny_clip_dir, tiny_open_clip, tiny_siglip_dir
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from mmit.config import CustomPart, OpenClipEncoder, TransformersEncoder
from mmit.errors import ConfigError
from mmit.models.encoders import ImageInput, TransformersTower, build_encoder
from mmit.models.encoders.open_clip_towers import OpenClipTower, clip_vision_config
from mmit.models.layout import to_disk

PIXELS = torch.randn((2, 3, 28, 28), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip_dir(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_siglip_dir(tmp_path_factory.mktemp("siglip"))


def tower(path: Path | str, **fields: object) -> TransformersTower:
    section = TransformersEncoder.model_validate({"path": str(path), **fields})
    built = build_encoder(section, dtype=torch.float32)
    assert isinstance(built, TransformersTower)
    return built


@pytest.mark.parametrize("layer", [-1, -2, -4, 0, 1, 3])
@torch.no_grad()
def test_clip_is_read_at_the_layer_of_transformers_hidden_states(clip: Path, layer: int) -> None:
    built = tower(clip, layer=layer)
    expected = built.model(PIXELS, output_hidden_states=True).hidden_states[layer]
    assert torch.equal(built(PIXELS), expected[:, 1:])
    assert torch.equal(tower(clip, layer=layer, cls="keep")(PIXELS), expected)


@torch.no_grad()
def test_siglip_has_no_class_token_to_drop(siglip: Path) -> None:
    built = tower(siglip)
    expected = built.model(PIXELS, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(built(PIXELS), expected)
    assert (built.width, built.patches) == (24, 4)
    assert built.image == ImageInput(size=(28, 28), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def test_width_patches_and_pixels_are_known_beforehand(clip: Path) -> None:
    built = tower(clip)
    assert (built.width, built.patches) == (24, 4)
    assert tower(clip, cls="keep").patches == 5
    assert built.image == ImageInput(size=(28, 28), mean=OPENAI_MEAN, std=OPENAI_STD)


def test_a_whole_clip_model_serves_as_its_tower(clip: Path, tmp_path: Path) -> None:
    vision = CLIPVisionConfig.from_pretrained(clip)
    text = CLIPTextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    whole = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16))
    whole.save_pretrained(tmp_path)
    shutil.copy(clip / "preprocessor_config.json", tmp_path)
    built = tower(tmp_path)
    name = "encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(built.model.get_parameter(name), whole.vision_model.get_parameter(name))


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("cls", ["drop", "keep"])
@torch.no_grad()
def test_open_clip_gives_the_hidden_states_of_the_clip_it_is_saved_as(
    tmp_path: Path, quick_gelu: bool, cls: str
) -> None:
    section = OpenClipEncoder.model_validate({**tiny_open_clip(tmp_path, quick_gelu=quick_gelu), "cls": cls})
    built = build_encoder(section, dtype=torch.float32)
    assert isinstance(built, OpenClipTower)
    config = clip_vision_config(built)
    assert config is not None
    twin = CLIPVisionModel(CLIPVisionConfig(**{k: v for k, v in config.items() if k != "model_type"})).eval()
    stored = to_disk(built, {f"vision_tower.{name}": p for name, p in built.named_parameters()})
    prefix = "vision_tower.vision_model."
    twin.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in stored.items()})
    expected = twin(PIXELS, output_hidden_states=True).hidden_states[-2]
    # fp32; the joined q, k, v product rounds in another order
    torch.testing.assert_close(built(PIXELS), expected if cls == "keep" else expected[:, 1:], rtol=0, atol=5e-6)
    assert built.patches == (5 if cls == "keep" else 4)
    assert built.image == ImageInput(size=(28, 28), mean=OPENAI_MEAN, std=OPENAI_STD)


@torch.no_grad()
def test_open_clip_layer_is_taken_before_the_final_norm(tmp_path: Path) -> None:
    section = OpenClipEncoder.model_validate({**tiny_open_clip(tmp_path), "layer": -1})
    built = build_encoder(section, dtype=torch.float32)
    assert isinstance(built, OpenClipTower)
    embedded = built.model._embeds(PIXELS)
    assert torch.equal(built(PIXELS), built.model.transformer(embedded)[:, 1:])


class Stripes(nn.Module):
    """An encoder of one's own: the mean of each row of a tile."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.width, self.patches = side, side
        self.image = ImageInput(size=(side, side), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.mean(dim=1) * self.scale


def test_an_encoder_of_ones_own_is_named_by_its_class() -> None:
    section = CustomPart(type=f"{__name__}:Stripes", args={"side": 8})
    built = build_encoder(section, dtype=torch.bfloat16)
    assert isinstance(built, Stripes)
    assert built.scale.dtype == torch.bfloat16
    assert not built.training


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "no_such_package:Thing"}, "no module 'no_such_package'"),
        ({"type": "torch.nn:NoSuchThing"}, "'torch.nn' has no 'NoSuchThing'"),
        ({"type": "torch.nn:Linear", "args": {"wdith": 3}}, "wdith"),
        ({"type": "torch.nn:Identity"}, "lacks one of 'width', 'patches' and 'image'"),
        ({"type": "builtins:dict"}, "no torch.nn.Module"),
    ],
)
def test_a_wrong_class_is_named(part: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_encoder(CustomPart.model_validate(part), dtype=torch.float32)


@pytest.mark.parametrize("layer", [4, -5])
def test_a_layer_that_does_not_exist_is_an_error(clip: Path, layer: int) -> None:
    with pytest.raises(ConfigError, match=f"{layer} does not exist in an encoder of 3 layers; take -4 to 3"):
        tower(clip, layer=layer)


def test_a_directory_without_pixel_statistics_is_an_error(clip: Path, tmp_path: Path) -> None:
    shutil.copytree(clip, tmp_path / "clip")
    file = tmp_path / "clip" / "preprocessor_config.json"
    content = json.loads(file.read_text())
    del content["image_mean"]
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="lacks image_mean and image_std"):
        tower(tmp_path / "clip")
    file.unlink()
    with pytest.raises(ConfigError, match=r"has no preprocessor_config\.json"):
        tower(tmp_path / "clip")


def test_other_models_and_missing_ones_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="holds a model of type 'bert'"):
        tower(tmp_path)
    with pytest.raises(ConfigError, match=r"there is no directory .*nowhere"):
        tower(tmp_path / "nowhere")


def test_open_clip_names_and_tags_are_checked_before_anything_is_fetched(tmp_path: Path) -> None:
    for name, pretrained, message in (
        ("ViT-Z-99", "openai", "open_clip has no model 'ViT-Z-99'"),
        ("ViT-B-32", "not-a-tag", "'not-a-tag' is no file and no tag of ViT-B-32"),
        (str(tmp_path / "no.json"), "openai", "there is no file"),
    ):
        section = OpenClipEncoder(type="open_clip", name=name, pretrained=pretrained)
        with pytest.raises(ConfigError, match=message):
            build_encoder(section, dtype=torch.float32)


def test_open_clip_networks_without_patches_are_refused(tmp_path: Path) -> None:
    description = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
    }
    import open_clip

    name = tmp_path / "tiny-resnet.json"
    name.write_text(json.dumps(description))
    open_clip.add_model_config(str(name))
    torch.save(open_clip.create_model("tiny-resnet").state_dict(), tmp_path / "resnet.pt")
    section = OpenClipEncoder(type="open_clip", name=str(name), pretrained=str(tmp_path / "resnet.pt"))
    with pytest.raises(ConfigError, match="ModifiedResNet of open_clip is no plain vision transformer"):
        build_encoder(section, dtype=torch.float32)
