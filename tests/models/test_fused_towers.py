"""Several encoders side by side: each with its own view of the picture, features joined along the width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_factories import tiny_clip_dir, tiny_siglip_dir
from pydantic import TypeAdapter
from torch import Tensor, nn

from mmit.config import Encoder
from mmit.errors import ConfigError
from mmit.models.encoders import FusedTower, ImageInput, build_encoder


class Patches(nn.Module):
    """A square grid of ``side`` x ``side`` features: the mean colour of each patch of four pixels."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.width, self.patches = 3, side * side
        self.image = ImageInput(size=(2 * side, 2 * side), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, pixels: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(pixels, 2).flatten(2).transpose(1, 2) * self.scale


def custom(side: int) -> dict[str, Any]:
    return {"type": f"{__name__}:Patches", "args": {"side": side}}


def built(sections: list[dict[str, Any]]) -> FusedTower:
    made = build_encoder(TypeAdapter(Encoder).validate_python(sections), dtype=torch.float32)
    assert isinstance(made, FusedTower)
    return made


@torch.no_grad()
def test_each_encoder_sees_its_region_and_widths_add_up(tmp_path: Path) -> None:
    clip = {"type": "transformers", "path": str(tiny_clip_dir(tmp_path / "clip")), "image_size": 42}
    siglip = {
        "type": "transformers",
        "path": str(tiny_siglip_dir(tmp_path / "siglip")),
        "image_size": 42,
        "layer": [-1, -2],
    }
    fused = built([clip, siglip, custom(3)])
    assert (fused.width, fused.patches) == (24 + 2 * 24 + 3, 9)
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn((2, 3, side, side), generator=generator) for side in (42, 42, 6)]
    canvas = torch.full((2, 3, 90, 42), torch.nan)  # what is beside a narrow view must not matter
    canvas[:, :, :42], canvas[:, :, 42:84], canvas[:, :, 84:, :6] = views
    expected = [tower(view) for tower, view in zip(fused.towers, views, strict=True)]
    assert torch.equal(fused(canvas), torch.cat(expected, dim=-1))


@torch.no_grad()
def test_another_grid_is_laid_over_the_first_ones() -> None:
    fused = built([custom(4), custom(2)])
    assert (fused.width, fused.patches) == (6, 16)
    pixels = torch.zeros((1, 3, 12, 8))
    pixels[:, :, 8:, 2:4] = 1.0  # right half of the second view
    features = fused(pixels)[0, :, 3].view(4, 4)
    # two columns 0, 1 at places 0.5 and 2.5 of the four: 0, a quarter, three quarters, 1
    torch.testing.assert_close(features, torch.tensor([[0.0, 0.25, 0.75, 1.0]]).expand(4, 4))
    assert torch.equal(fused(pixels)[..., :3], torch.zeros((1, 16, 3)))


def test_a_class_token_cannot_be_laid_over_a_grid(tmp_path: Path) -> None:
    clip = {"type": "transformers", "path": str(tiny_clip_dir(tmp_path)), "cls": "keep"}
    with pytest.raises(ConfigError, match=r"model\.encoder\.1: its 5 features cannot be laid over the 16"):
        built([custom(4), clip])


def test_gradients_reach_every_encoder() -> None:
    fused = built([custom(4), custom(3)])
    fused(torch.ones((1, 3, 14, 8))).sum().backward()
    assert all(parameter.grad is not None for parameter in fused.parameters())
