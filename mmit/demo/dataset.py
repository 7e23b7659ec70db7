"""The demo's data: captions, dialogues and test questions as anyone would have them, then converted like anyone's.

LLaVA-format JSON beside a folder of pictures, one for each split; ``mmit.data.convert`` makes the shards.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmit.data.convert import Conversion, convert
from mmit.demo.clip import png
from mmit.demo.world import Pairs, Scene, World, ask, caption, make_scene

Kind = Literal["captions", "dialogues", "questions"]


@dataclass(frozen=True, kw_only=True)
class Split:
    """One set of pictures. pairs: which colour-shape pairs it shows; seed: no two splits share one."""

    name: str
    kind: Kind
    pictures: int
    pairs: Pairs
    seed: int


def write_split(split: Split, world: World, folder: Path, *, on_picture: Callable[[], None]) -> Path:
    """Draw and describe a split below ``folder``, convert it, and give the directory of its shards.

    A split that is there already is left as it is.
    """
    shards = folder / "shards" / split.name
    if (shards / "manifest.json").is_file():
        return shards
    raw = folder / "raw" / split.name
    (raw / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(split.seed)
    records: list[dict[str, Any]] = []
    for number in range(split.pictures):
        scene = make_scene(world, rng, pairs=split.pairs)
        name = f"{number:06d}.png"
        (raw / "images" / name).write_bytes(png(scene, rng))
        records += _records(split, scene, world, f"images/{name}", rng)
        on_picture()
    source = raw / "records.json"
    source.write_text(json.dumps(records, indent=0), encoding="utf-8")
    convert(
        Conversion(reader="llava_json", source=source, target=shards, name=split.name, images=raw),
        processes=1,
        overwrite=True,
        progress=False,
    )
    return shards


def _records(split: Split, scene: Scene, world: World, image: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    record_id = image.removesuffix(".png").rsplit("/", 1)[-1]
    kinds = [kind for kind in world.question_types if scene.admits(kind)]
    if split.kind == "captions":
        turns = [("human", "<image>\nDescribe the picture."), ("gpt", caption(scene, rng))]
        return [_record(record_id, image, turns)]
    if split.kind == "dialogues":
        turns = []
        for position, kind in enumerate(rng.permutation(kinds)):
            question = ask(scene, str(kind), rng)
            turns += [("human", ("<image>\n" if position == 0 else "") + question.text), ("gpt", question.answer)]
        return [_record(record_id, image, turns)]
    found = []
    for kind in kinds:
        question = ask(scene, kind, rng)
        turns = [("human", f"<image>\n{question.text}"), ("gpt", question.answer)]
        found.append(_record(f"{record_id}-{kind}", image, turns) | {"type": kind})
    return found


def _record(record_id: str, image: str, turns: list[tuple[str, str]]) -> dict[str, Any]:
    return {"id": record_id, "image": image, "conversations": [{"from": who, "value": text} for who, text in turns]}
