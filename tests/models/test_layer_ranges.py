"""Rules that name layers by number, alike for every library's towers and language models."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_factories import tiny_clip_dir, tiny_dino_dir, tiny_open_clip
from pydantic import TypeAdapter
from test_encoder_directories import hub, timm_section
from test_fused_towers import custom
from torch import nn

from mmit.config import Encoder
from mmit.errors import ConfigError
from mmit.models import LoadedModel
from mmit.models.encoders import build_encoder
from mmit.models.rules import apply_rules

Build = Callable[..., LoadedModel]


class Tower(nn.Module):
    """A model that has a tower only."""

    def __init__(self, section: Any) -> None:
        super().__init__()
        self.vision_tower = build_encoder(TypeAdapter(Encoder).validate_python(section), dtype=torch.float32)


def numbers(model: nn.Module, rule: str) -> dict[str, set[int]]:
    """What stands before the number of a layer, and the numbers, in the names of the parameters that a rule trains."""
    (group,) = apply_rules(model, {rule: 1e-6}, unused=set)
    found: dict[str, set[int]] = {}
    for name in group.names:
        match = re.match(r"(.*?(?:layers?|blocks|resblocks|h))\.(\d+)\.", name)
        assert match is not None, name
        found.setdefault(match[1], set()).add(int(match[2]))
    return found


TOWERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "clip": (lambda folder: hub(tiny_clip_dir(folder)), "vision_tower.model.encoder.layers"),
    "dinov2": (lambda folder: hub(tiny_dino_dir(folder, "dinov2")), "vision_tower.model.encoder.layer"),
    "dinov3": (lambda folder: hub(tiny_dino_dir(folder, "dinov3_vit")), "vision_tower.model.model.layer"),
    "open_clip": (tiny_open_clip, "vision_tower.model.transformer.resblocks"),
    "eva of timm": (lambda folder: timm_section("tiny_eva", folder), "vision_tower.model.blocks"),
}


@pytest.mark.parametrize("kind", TOWERS)
def test_layers_are_counted_alike_whatever_a_library_calls_them(kind: str, tmp_path: Path) -> None:
    make, where = TOWERS[kind]
    model = Tower(make(tmp_path))
    assert numbers(model, "vision_tower.layers.1-") == {where: {1, 2}}
    assert numbers(model, "vision_tower.layers.0-1") == {where: {0, 1}}
    assert numbers(model, "vision_tower.layers.2") == {where: {2}}
    with pytest.raises(
        ConfigError, match=r"'vision_tower\.layers\.3-' matches no layer; vision_tower has 3 layers, 0 to 2"
    ):
        numbers(model, "vision_tower.layers.3-")


def test_of_several_encoders_one_or_all_are_meant(tmp_path: Path) -> None:
    model = Tower([TOWERS["clip"][0](tmp_path / "clip"), TOWERS["dinov2"][0](tmp_path / "dino"), custom(2)])
    first, second = "vision_tower.towers.0.model.encoder.layers", "vision_tower.towers.1.model.encoder.layer"
    assert numbers(model, "vision_tower.layers.2-") == {first: {2}, second: {2}}
    assert numbers(model, "vision_tower.1.layers.0-1") == {second: {0, 1}}
    with pytest.raises(ConfigError, match="matches no layer; vision_tower has no such numbered layers"):
        numbers(model, "vision_tower.2.layers.0-")


def test_language_models_have_layers_too(build: Build) -> None:
    loaded = build()
    (group,) = loaded.model.train_only({"language_model.layers.1-": 1e-5})
    assert group.names
    assert all(name.startswith("language_model.model.layers.1.") for name in group.names)
    with pytest.raises(ConfigError, match="matches no layer; language_model has 2 layers, 0 to 1"):
        loaded.model.train_only({"language_model.layers.2-5": 1e-5})


def test_a_range_is_a_rule_among_others_and_layers_behind_the_one_read_are_not_trained(build: Build) -> None:
    loaded = build("open_clip_llama")  # three layers, read at -2
    groups = loaded.model.train_only({"connector": 1e-3, "vision_tower": 1e-6, "vision_tower.layers.1-": 2e-6})
    assert [group.pattern for group in groups] == ["connector", "vision_tower", "vision_tower.layers.1-"]
    assert not any("resblocks.1." in name for name in groups[1].names)
    assert all("resblocks.1." in name for name in groups[2].names)
    with pytest.raises(ConfigError, match=r"behind model\.encoder\.layer"):
        loaded.model.train_only({"vision_tower.layers.2-": 2e-6})
