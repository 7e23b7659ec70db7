"""Several encoders' views of one tile in one canvas."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmit.errors import ConfigError
from mmit.images import ImageSpec, View, normalize

FIRST: dict[str, Any] = {"size": (28, 28), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2), "resize": "pad"}
SECOND: dict[str, Any] = {"size": (16, 24), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "resize": "squash"}
THIRD: dict[str, Any] = {"size": (12, 32), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "resize": "crop"}


def picture() -> bytes:
    grey = np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(grey).save(data, "PNG")
    return data.getvalue()


def spec(first: dict, *others: dict, exact: bool = True) -> ImageSpec:
    return ImageSpec(**first, tokens_per_tile=4, exact=exact, views=tuple(View(**other) for other in others))


@pytest.mark.parametrize("exact", [True, False])
def test_each_view_is_what_the_encoder_would_see_alone(exact: bool) -> None:
    fused = spec(FIRST, SECOND, THIRD, exact=exact)
    assert fused.canvas == (28 + 16 + 12, 32)
    pixels = fused.prepare(picture())
    assert pixels.shape == (1, 3, *fused.canvas)
    floats = normalize(pixels, fused)
    assert floats.shape == pixels.shape
    for (top, view), alone in zip(fused.regions, (FIRST, SECOND, THIRD), strict=True):
        height, width = view.size
        single = spec(alone, exact=exact)
        expected = single.prepare(picture())
        assert torch.equal(pixels[:, :, top : top + height, :width], expected)
        assert torch.equal(floats[:, :, top : top + height, :width], normalize(expected, single))


def test_views_survive_json_and_are_told_apart() -> None:
    fused = spec(FIRST, SECOND)
    again = ImageSpec.from_dict(fused.to_dict())
    assert again == fused
    assert hash(again) == hash(fused)
    assert again.fingerprint() == fused.fingerprint() != spec(FIRST, THIRD).fingerprint()


def test_a_spec_without_views_is_written_as_before_there_were_any() -> None:
    assert "views" not in spec(FIRST).to_dict()
    assert spec(FIRST).canvas == (28, 28)


@pytest.mark.parametrize("wrong", [{"resize": "stretch"}, {"std": (0.0, 1.0, 1.0)}, {"size": (0, 3)}])
def test_a_wrong_view_is_a_config_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        spec(FIRST, SECOND | wrong)
