"""The demo's world: pictures of one or two like shapes, drawn with Pillow, and what can be said and asked about them.

Everything is a function of a scene and a passed random generator. Some colour-shape pairs can be kept out of the
scenes, so that a model can be asked about combinations that its tuning has not shown. Writing files is the business
of ``mmit.demo.dataset``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from PIL import Image, ImageDraw

T = TypeVar("T")
Pairs = Literal["all", "tuning", "held out"]

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 150, 44),
    "blue": (40, 80, 220),
    "yellow": (250, 215, 40),
    "purple": (150, 50, 190),
    "orange": (255, 130, 20),
}
BACKGROUNDS = {"white": (245, 245, 245), "gray": (150, 150, 150), "pink": (255, 170, 200), "cyan": (150, 235, 235)}
SHAPES = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
"""Each shape's name and its plural."""
PLACES = {"left": (0.26, 0.5), "right": (0.74, 0.5), "top": (0.5, 0.26), "bottom": (0.5, 0.74)}
"""Where a single shape can stand: the centre, as shares of width and height."""

PICTURE_SIZE = 96

_SUPERSAMPLING = 3
_OUTLINE = (25, 25, 25)
_DIAGONALS = (((0.26, 0.26), (0.74, 0.74)), ((0.26, 0.74), (0.74, 0.26)))
"""Where two shapes stand: far enough apart that the largest do not touch."""
_HALF_WIDTHS = {"small": 0.155, "large": 0.23}
_JITTER = 0.02


@dataclass(frozen=True, kw_only=True)
class World:
    """What there can be in a scene, what is asked, and which (colour, shape) pairs a model is never tuned on."""

    colours: tuple[str, ...] = tuple(COLOURS)
    shapes: tuple[str, ...] = tuple(SHAPES)
    sizes: tuple[str, ...] = ("small", "large")
    counts: tuple[str, ...] = ("one", "two")
    places: tuple[str, ...] = tuple(PLACES)
    backgrounds: tuple[str, ...] = tuple(BACKGROUNDS)
    question_types: tuple[str, ...] = ("colour", "shape", "size", "place", "count", "background")
    held_out: frozenset[tuple[str, str]] = frozenset({("red", "cross"), ("blue", "circle"), ("yellow", "triangle")})

    def pairs(self, which: Pairs) -> list[tuple[str, str]]:
        """The colour-shape pairs of scenes of this kind."""
        everything = [(colour, shape) for colour in self.colours for shape in self.shapes]
        return (
            everything if which == "all" else [p for p in everything if (p in self.held_out) == (which == "held out")]
        )


@dataclass(frozen=True, kw_only=True)
class Scene:
    """``count`` shapes that are alike; ``place`` is where a single one stands, and "" for two."""

    colour: str
    shape: str
    size: str
    count: str
    place: str
    background: str

    def admits(self, question_type: str) -> bool:
        """Whether a question of this type has an answer: only a single shape has a place."""
        return getattr(self, question_type) != ""


@dataclass(frozen=True)
class Question:
    """A question about a scene, its type and its one-word answer."""

    type: str
    text: str
    answer: str


def make_scene(world: World, rng: np.random.Generator, *, pairs: Pairs) -> Scene:
    """A random scene with a colour and shape of ``pairs``.

    Attributes are uniform and independent of each other.
    """
    colour, shape = _pick(rng, world.pairs(pairs))
    count = _pick(rng, world.counts)
    return Scene(
        colour=colour,
        shape=shape,
        size=_pick(rng, world.sizes),
        count=count,
        place=_pick(rng, world.places) if count == "one" else "",
        background=_pick(rng, world.backgrounds),
    )


def _pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    return choices[int(rng.integers(len(choices)))]


# ------------------------------------------------------------------------------------------------ pictures


def draw(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The scene as a picture; shades, positions, sizes and angles vary a little."""
    side = PICTURE_SIZE * _SUPERSAMPLING
    image = Image.new("RGB", (side, side), _shade(BACKGROUNDS[scene.background], rng))
    pen = ImageDraw.Draw(image)
    half_width = side * _HALF_WIDTHS[scene.size]
    for centre in _centres(scene, rng):
        x, y = (side * (c + rng.uniform(-_JITTER, _JITTER)) for c in centre)
        radius = half_width * rng.uniform(0.95, 1.05)
        corners = [(x + radius * u, y + radius * v) for u, v in _corners(scene.shape, rng.uniform(-0.12, 0.12))]
        pen.polygon(corners, fill=_shade(COLOURS[scene.colour], rng), outline=_OUTLINE, width=2 * _SUPERSAMPLING)
    return image.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BOX)


def _centres(scene: Scene, rng: np.random.Generator) -> tuple[tuple[float, float], ...]:
    if scene.count == "one":
        return (PLACES[scene.place],)
    return _pick(rng, _DIAGONALS)


def _shade(colour: tuple[int, int, int], rng: np.random.Generator) -> tuple[int, int, int]:
    r, g, b = (int(np.clip(value + rng.integers(-10, 11), 0, 255)) for value in colour)
    return r, g, b


def _corners(shape: str, angle: float) -> list[tuple[float, float]]:
    """Corners of a shape of half-width 1 around the origin, turned by ``angle`` radians; y points down."""
    if shape == "circle":
        points = _ring(40, 1.0)
    elif shape == "square":
        points = [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]
    elif shape == "triangle":
        points = [(0.0, -1.0), (1.05, 0.85), (-1.05, 0.85)]
    else:
        assert shape == "cross", shape
        arm = [(-0.34, -1.05), (0.34, -1.05), (0.34, -0.34)]  # the upper arm; three quarter turns give the others
        points = [turned for quarter in range(4) for turned in _turn(arm, quarter * math.pi / 2)]
    return _turn(points, angle)


def _turn(points: list[tuple[float, float]], angle: float) -> list[tuple[float, float]]:
    cos, sin = math.cos(angle), math.sin(angle)
    return [(x * cos - y * sin, x * sin + y * cos) for x, y in points]


def _ring(count: int, radius: float) -> list[tuple[float, float]]:
    angles = [2 * math.pi * k / count for k in range(count)]
    return [(radius * math.sin(a), -radius * math.cos(a)) for a in angles]


# ------------------------------------------------------------------------------------------------ words

_ONE = (
    "a {size} {colour} {shape} at the {place} on a {background} background.",
    "on {background} there is one {size} {colour} {shape}, at the {place}.",
    "one {shape} at the {place}, {size} and {colour}. the background is {background}.",
)
_TWO = (
    "{count} {size} {colour} {shapes} on a {background} background.",
    "on {background} there are {count} {size} {colour} {shapes}.",
    "{count} {shapes}, {size} and {colour}. the background is {background}.",
)
_QUESTIONS = {
    "colour": ("what colour do you see?", "which colour is used for the drawing?", "name the colour of what is drawn."),
    "shape": ("what is drawn here?", "which kind of shape is it?", "name the shape."),
    "size": ("how large is it?", "is it small or large?", "which size does it have?"),
    "place": ("where is it?", "at which side is it?", "tell me where it is."),
    "count": ("how many are there?", "count the shapes.", "what is the number of shapes?"),
    "background": ("what is behind it?", "name the colour of the background.", "which background is it?"),
}


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """All there is to know of a scene, in one of several wordings."""
    wording = _pick(rng, _ONE if scene.count == "one" else _TWO)
    return wording.format(shapes=SHAPES[scene.shape], **vars(scene))


def tags(scene: Scene, rng: np.random.Generator) -> str:
    """The same facts as words in random order, each once or a few times."""
    facts = [fact for fact in vars(scene).values() if fact]
    words = [fact for fact in facts for _ in range(rng.integers(1, 4))]
    return " ".join(words[number] for number in rng.permutation(len(words)))


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> Question:
    """A question of type ``kind`` in one of several wordings, none of which gives anything away."""
    return Question(kind, _pick(rng, _QUESTIONS[kind]), getattr(scene, kind))
