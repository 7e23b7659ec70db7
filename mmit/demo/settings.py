"""Sizes and budgets of the demo: the full one of ``make demo``, and a small one for a test."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mmit.demo.clip import ClipSettings
from mmit.demo.dataset import Split
from mmit.demo.language import LanguageSettings
from mmit.demo.world import World


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """The budget of one stage: rows of ``length`` tokens, steps, learning rates by part; ``epochs`` at the most."""

    steps: int
    length: int
    rows_per_step: int
    train: dict[str, float]
    warmup_fraction: float = 0.1
    epochs: int = 50


SIMPLE = World(
    shapes=("circle", "triangle", "cross"),
    counts=("one",),
    question_types=("colour", "shape", "size", "place", "background"),
    held_out=frozenset({("red", "circle"), ("blue", "triangle"), ("green", "cross")}),
)
"""One shape at a time: a world that a small model learns to see in minutes."""


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """The whole demo. test_pictures: held-out pictures asked about, of seen and of unseen pairs."""

    world: World = SIMPLE
    clip: ClipSettings = ClipSettings()
    language: LanguageSettings = LanguageSettings()
    align_pictures: int = 2500
    instruct_pictures: int = 2500
    test_pictures: int = 100
    align: StageSettings = StageSettings(steps=160, length=512, rows_per_step=4, train={"connector": 5e-3})
    instruct: StageSettings = StageSettings(
        steps=200, length=512, rows_per_step=8, train={"connector": 3e-3, "language_model": 1e-3}
    )

    @property
    def splits(self) -> list[Split]:
        """All sets of pictures; no two share a seed."""
        return [
            # captions show every pair, as the encoder's did; what is held out is held out of tuning
            Split(name="align", kind="captions", pictures=self.align_pictures, pairs="all", seed=101),
            Split(name="instruct", kind="dialogues", pictures=self.instruct_pictures, pairs="tuning", seed=102),
            Split(name="majority", kind="questions", pictures=self.test_pictures, pairs="tuning", seed=106),
            Split(name="test", kind="questions", pictures=self.test_pictures, pairs="tuning", seed=103),
            Split(name="test_unseen", kind="questions", pictures=self.test_pictures, pairs="held out", seed=104),
            Split(name="test_captions", kind="captions", pictures=self.test_pictures, pairs="tuning", seed=105),
        ]


FULL = DemoSettings()

_SMALL_WORLD = replace(
    World(),
    colours=("red", "blue", "green", "yellow"),
    shapes=("circle", "square"),
    counts=("one",),
    question_types=("colour", "background"),
    held_out=frozenset({("red", "circle")}),
)
TEST = DemoSettings(
    world=_SMALL_WORLD,
    clip=ClipSettings(scenes=300, steps=30, groups=16),
    language=LanguageSettings(hidden=96, inner=256, steps=50),
    align_pictures=300,
    instruct_pictures=300,
    test_pictures=40,
    align=StageSettings(steps=20, length=512, rows_per_step=2, train={"connector": 5e-3}),
    instruct=StageSettings(steps=40, length=512, rows_per_step=4, train={"connector": 2e-3, "language_model": 2e-3}),
)
