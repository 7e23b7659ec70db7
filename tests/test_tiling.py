"""Tiling: the tokens a plan counts are those that are put together, and both are transformers'."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import GotOcr2ImageProcessorPil, LlavaNextImageProcessorPil
from transformers.image_utils import SizeDict
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from mmit.errors import ConfigError
from mmit.images import ImageSpec, View
from mmit.models.mosaic import lay_out
from mmit.models.tiling import GRIDS
from mmit.tiling import Anyres, Dynamic, Tiling, tiling_from_dict, tiling_to_dict

SIDE = 4
TILE = 56


def pinpoints(name: str, tile: int = TILE) -> tuple[tuple[int, int], ...]:
    return tuple((columns * tile, rows * tile) for columns, rows in GRIDS[name])


def spec(tiling: Tiling | None, **fields: Any) -> ImageSpec:
    half = (0.5, 0.5, 0.5)
    values: dict[str, Any] = {"size": (TILE, TILE), "mean": half, "std": half, "resize": "pad"}
    values |= {"tokens_per_tile": SIDE**2, "tiling": tiling, **fields}
    return ImageSpec(**values)


def png(width: int, height: int) -> bytes:
    """A picture with soft waves in three colours."""
    down, across = np.mgrid[:height, :width]
    waves = [np.sin(across / 5 + shift) * np.cos(down / (6 + shift)) for shift in range(3)]
    grey = (127 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "PNG")
    return file.getvalue()


sizes = st.tuples(st.integers(1, 400), st.integers(1, 400))
anyres = st.builds(
    Anyres,
    pinpoints=st.sampled_from([pinpoints("llava_next"), pinpoints("onevision"), ((TILE, TILE),)]),
    shrink_to=st.sampled_from([0, 1, 4, 9]),
    several=st.sampled_from(["tiled", "whole"]),
)
flat = st.builds(Anyres, pinpoints=st.just(pinpoints("llava_next")), unpad=st.just(value=False))
dynamic = st.builds(Dynamic, min_tiles=st.integers(1, 3), max_tiles=st.integers(3, 12), thumbnail=st.booleans())


@settings(max_examples=120, deadline=None)
@given(tiling=st.one_of(anyres, flat, dynamic), shown=st.lists(sizes, min_size=1, max_size=3))
def test_a_plan_counts_the_tokens_that_are_put_together(tiling: Tiling, shown: list[tuple[int, int]]) -> None:
    plans = [spec(tiling).plan(*size, images=len(shown)) for size in shown]
    tiles = torch.randn(sum(plan.tiles for plan in plans), SIDE**2, 2)
    assert len(lay_out(tiles, plans, torch.zeros(2))) == sum(plan.tokens for plan in plans)


@settings(max_examples=25, deadline=None)
@given(tiling=st.one_of(anyres, flat, dynamic), size=sizes, exact=st.booleans(), images=st.integers(1, 2))
def test_an_image_is_cut_into_as_many_tiles_as_its_plan_says(
    tiling: Tiling, size: tuple[int, int], exact: bool, images: int
) -> None:
    one = spec(tiling, exact=exact)
    assert len(one.prepare(png(*size), images=images)) == one.plan(*size, images=images).tiles


def theirs(model: Any, features: torch.Tensor, size: tuple[int, int], listed: Any, **more: Any) -> torch.Tensor:
    """What transformers makes of the tokens of one image's tiles; its sizes and pinpoints are (height, width)."""
    vision = SimpleNamespace(image_size=TILE, patch_size=TILE // SIDE)
    config = SimpleNamespace(vision_config=vision, image_grid_pinpoints=[[height, width] for width, height in listed])
    packed = model.pack_image_features
    newline = torch.tensor([7.0, 8.0])
    made, _ = packed(SimpleNamespace(config=config), [features], [(size[1], size[0])], image_newline=newline, **more)
    return made[0]


@settings(max_examples=150, deadline=None)
@given(size=st.tuples(st.integers(1, 2000), st.integers(1, 2000)), kind=st.sampled_from(["llava_next", "onevision"]))
def test_tokens_lie_as_transformers_lays_them(size: tuple[int, int], kind: str) -> None:
    listed = pinpoints(kind)
    is_next = kind == "llava_next"
    tiling = Anyres(pinpoints=listed, shrink_to=0 if is_next else 9, several="tiled" if is_next else "whole")
    plan = spec(tiling).plan(*size)
    features = torch.randn(plan.tiles, SIDE**2, 2, generator=torch.Generator().manual_seed(1))
    if is_next:
        expected = theirs(LlavaNextModel, features, size, listed, vision_feature_select_strategy="default")
    else:
        expected = theirs(LlavaOnevisionModel, features, size, listed, vision_aspect_ratio="anyres_max_9")
    assert torch.equal(lay_out(features, [plan], torch.tensor([7.0, 8.0])), expected)


def test_llava_next_counts_the_tokens_that_the_paper_counts() -> None:
    """A square of 672 pixels in tiles of 336 with 24 x 24 tokens: 576 + 48 * (48 + 1) = 2928; a strip has no rows."""
    big = spec(Anyres(pinpoints=pinpoints("llava_next", 336)), size=(336, 336), tokens_per_tile=576)
    assert (big.plan(672, 672).tiles, big.plan(672, 672).tokens) == (5, 2928)
    # 640 x 480 in 672 x 672: 504 of 672 rows of pixels are picture, 36 of 48 rows of tokens
    assert big.plan(640, 480).tokens == 576 + 36 * 49
    # 100000 x 1: no row of tokens is more picture than padding
    assert big.plan(100_000, 1).tokens == 576


def test_of_equally_good_grids_the_first_is_taken() -> None:
    """A tiny picture fits 1 x 2 tiles as it fits 2 x 1: the order of the list decides."""
    first, second = (336, 672), (672, 336)
    assert Anyres(pinpoints=(first, second)).best((50, 50)) == first
    assert Anyres(pinpoints=(second, first)).best((50, 50)) == second


@pytest.mark.parametrize("size", [(100, 40), (31, 200), (7, 9), (56, 56)])
def test_exact_tiles_are_those_of_the_pil_processor(size: tuple[int, int]) -> None:
    listed = pinpoints("llava_next")
    reference: Any = LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=[[height, width] for width, height in listed],
        do_normalize=False,
        do_rescale=False,
    )
    with Image.open(io.BytesIO(png(*size))) as image:
        expected = torch.as_tensor(np.array(reference(image)["pixel_values"][0]))
    tiles = spec(Anyres(pinpoints=listed), exact=True).prepare(png(*size))
    assert torch.equal(tiles, expected.to(torch.uint8))
    faster = spec(Anyres(pinpoints=listed)).prepare(png(*size))
    assert int((faster.int() - tiles.int()).abs().max()) <= 3


@settings(max_examples=150, deadline=None)
@given(size=st.tuples(st.integers(1, 3000), st.integers(1, 3000)), most=st.integers(1, 12))
def test_dynamic_grids_are_those_of_internvl_in_transformers(size: tuple[int, int], most: int) -> None:
    columns, rows = get_optimal_tiled_canvas((size[1], size[0]), (448, 448), 1, most)
    assert Dynamic(max_tiles=most).grid(size, (448, 448)) == (rows, columns)


@pytest.mark.parametrize("size", [(130, 60), (40, 40), (50, 140)])
def test_dynamic_tiles_are_those_of_internvl_in_transformers_with_the_thumbnail_last(size: tuple[int, int]) -> None:
    with Image.open(io.BytesIO(png(*size))) as image:
        expected = GotOcr2ImageProcessorPil().crop_image_to_patches(
            np.asarray(image).transpose(2, 0, 1),
            min_patches=1,
            max_patches=6,
            patch_size=SizeDict(height=TILE, width=TILE),
            resample=Image.Resampling.BICUBIC,
        )
    tiles = spec(Dynamic(max_tiles=6), exact=True).prepare(png(*size))
    assert torch.equal(tiles, torch.from_numpy(np.stack(expected)))


def test_every_view_of_a_tile_shows_the_same_part_of_the_picture() -> None:
    """Two encoders of other sizes: the left half of the picture is red, and so is the left tile of both views."""
    small = View(size=(28, 28), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize="squash")
    canvas = Image.new("RGB", (112, 56), "blue")
    canvas.paste("red", (0, 0, 56, 56))
    file = io.BytesIO()
    canvas.save(file, "PNG")
    whole, left, right = spec(Anyres(pinpoints=((112, 56),)), views=(small,)).prepare(file.getvalue())
    assert whole.shape == (3, 56 + 28, 56)
    for top, side in ((0, 56), (56, 28)):
        regions = [tile[:, top + 4 : top + side - 4, 4 : side - 4].float().mean(dim=(1, 2)) for tile in (left, right)]
        assert regions[0].tolist() == [255, 0, 0]
        assert regions[1].tolist() == [0, 0, 255]


@pytest.mark.parametrize("tiling", [Anyres(pinpoints=pinpoints("llava_next"), shrink_to=9), Dynamic(max_tiles=4), None])
def test_a_tiling_survives_json_and_changes_the_fingerprint(tiling: Tiling | None) -> None:
    one = spec(tiling)
    assert ImageSpec.from_dict(one.to_dict()) == one
    assert (one.fingerprint() == spec(None).fingerprint()) == (tiling is None)
    assert ("tiling" in one.to_dict()) == (tiling is not None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: spec(Anyres(pinpoints=((100, 56),))), "pinpoint 100 x 56 is not whole tiles of 56 x 56"),
        (
            lambda: spec(Anyres(pinpoints=((56, 56),)), tokens_per_tile=17),
            "set unpad to false, or drop the class token",
        ),
        (lambda: Anyres(pinpoints=()), r"must be pairs of \(width, height\)"),
        (lambda: Anyres(pinpoints=((56, 56),), unpad=False, shrink_to=4), "above 0 only with unpad"),
        (lambda: Dynamic(min_tiles=3, max_tiles=2), "min_tiles is 3 and max_tiles 2"),
        (lambda: Dynamic(max_tiles=10**9), "max_tiles is 1000000000; take at most 1024"),
        (lambda: spec(Anyres(pinpoints=((28 * 10**6, 28 * 10**6),))), "tiles; take at most 1024"),
        (lambda: tiling_from_dict({"type": "spiral"}), "is not one that this version knows"),
        (lambda: tiling_from_dict(tiling_to_dict(Dynamic()) | {"new": 1}), "is not one that this version knows"),
        (lambda: spec(Dynamic(), draft=True), "draft gives up the detail"),
    ],
)
def test_what_cannot_be_cut_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
