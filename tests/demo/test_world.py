"""The drawn world: what is said of a picture is what is in it."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mmit.demo.clip import png
from mmit.demo.world import (
    BACKGROUNDS,
    COLOURS,
    PICTURE_SIZE,
    PLACES,
    Pairs,
    Scene,
    World,
    ask,
    caption,
    draw,
    make_scene,
    tags,
)

WORLD = World()
NEAR = 25  # a shade is at most 10 grey levels off; the rest is for averaging at edges


def scenes(count: int, *, pairs: Pairs = "all", seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [make_scene(WORLD, rng, pairs=pairs) for _ in range(count)]


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def islands(mask: np.ndarray) -> int:
    """Connected regions (4 neighbours) of at least 20 pixels."""
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}
    found = 0
    while left:
        stack, size = [left.pop()], 0
        while stack:
            y, x = stack.pop()
            size += 1
            for spot in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if spot in left:
                    left.remove(spot)
                    stack.append(spot)
        found += size >= 20
    return found


@pytest.mark.parametrize("shape", WORLD.shapes)
@pytest.mark.parametrize("place", WORLD.places)
def test_a_single_shape_has_its_colour_at_its_place_on_its_background(shape: str, place: str) -> None:
    for number, colour in enumerate(WORLD.colours):
        scene = Scene(colour=colour, shape=shape, size="small", count="one", place=place, background="pink")
        seen = pixels(draw(scene, np.random.default_rng(number)))
        x, y = (int(PICTURE_SIZE * c) for c in PLACES[place])
        assert abs(seen[y, x] - COLOURS[colour]).max() < NEAR
        assert abs(seen[0, 0] - BACKGROUNDS["pink"]).max() < NEAR


def test_as_many_shapes_are_drawn_as_the_scene_counts() -> None:
    for scene in scenes(60):
        seen = pixels(draw(scene, np.random.default_rng(1)))
        inside = abs(seen - seen[0, 0]).max(axis=-1) > NEAR
        assert islands(inside) == {"one": 1, "two": 2}[scene.count]


def test_large_shapes_cover_more_than_small_ones() -> None:
    for scene in scenes(30):
        area = {}
        for size in WORLD.sizes:
            seen = pixels(draw(replace(scene, size=size), np.random.default_rng(1)))
            area[size] = (abs(seen - seen[0, 0]).max(axis=-1) > NEAR).sum()
        # half-widths of 0.155 and 0.23, varied alike by the same seed: areas by a factor of 2.2
        assert area["large"] > 1.7 * area["small"]


def test_held_out_pairs_occur_only_where_they_are_asked_for() -> None:
    kinds: tuple[Pairs, ...] = ("all", "tuning", "held out")
    found = {pairs: {(s.colour, s.shape) for s in scenes(2000, pairs=pairs)} for pairs in kinds}
    assert found["held out"] == set(WORLD.held_out)
    assert found["tuning"] & found["held out"] == set()
    assert found["all"] == found["tuning"] | found["held out"]


def test_every_answer_is_about_as_frequent_as_the_others_of_its_type() -> None:
    for kind in ("colour", "shape", "size", "place", "background"):
        counts = Counter(getattr(scene, kind) for scene in scenes(4000) if scene.admits(kind))
        expected = counts.total() / len(counts)
        # five standard deviations of a binomial
        assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values()), kind


def test_a_question_says_nothing_about_its_scene() -> None:
    first, *others = (scene for scene in scenes(50) if scene.count == "one")
    for kind in WORLD.question_types:
        for seed in range(10):
            text = ask(first, kind, np.random.default_rng(seed)).text
            assert all(ask(other, kind, np.random.default_rng(seed)).text == text for other in others)


def test_only_a_single_shape_has_a_place() -> None:
    assert all(scene.admits("place") == (scene.count == "one") for scene in scenes(100))


def test_a_caption_and_tags_tell_every_answer() -> None:
    rng = np.random.default_rng(0)
    for scene in scenes(100):
        for text in (caption(scene, rng), tags(scene, rng)):
            for kind in WORLD.question_types:
                if scene.admits(kind) and not (kind == "count" and scene.count == "one"):
                    assert getattr(scene, kind) in text


def test_the_same_seed_draws_the_same_bytes() -> None:
    scene = scenes(1)[0]
    assert png(scene, np.random.default_rng(3)) == png(scene, np.random.default_rng(3))
    assert png(scene, np.random.default_rng(3)) != png(scene, np.random.default_rng(4))
