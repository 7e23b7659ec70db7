"""InstructPix2Pix' form: a folder of prompts, each with pairs of pictures before and after one edit.

    seeds.json                  [["0000001", ["1234567", ...]], ...]
    0000001/prompt.json         {"input", "edit", "output"}
    0000001/1234567_0.jpg, _1.jpg     before and after

Read as a question about both pictures whose answer is the edit.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmit.conversation import ImageRef, Message
from mmit.data import forms, rows
from mmit.data.faults import SampleError
from mmit.errors import DataError

_SPLITS = {"train": (0.0, 0.9), "val": (0.9, 0.9 + 0.05), "test": (0.9 + 0.05, 1.0), "all": (0.0, 1.0)}


@dataclass(frozen=True, kw_only=True)
class EditOptions:
    """split: by place in seeds.json, 90 / 5 / 5 percent, as the paper's code does.

    pairs: the first pair of every prompt, or all (up to four, with the same edit). question: put behind the pictures.
    """

    split: Literal["train", "val", "test", "all"] = "train"
    pairs: Literal["first", "all"] = "first"
    question: str = "Which edit turns the first picture into the second?"


def open_edits(source: Path, options: EditOptions, root: Path) -> tuple[rows.Rows, forms.Parse]:
    """One question for every pair; source: the folder, or its seeds.json. Raises DataError."""
    file = source / "seeds.json" if source.is_dir() else source

    def parse(record: Mapping[str, Any]) -> forms.Record:
        name, seed = record["name"], record["seed"]
        turns = [
            Message(role="user", content=(ImageRef(0), ImageRef(1), options.question)),
            Message(role="assistant", content=(_edit(root / name / "prompt.json"),)),
        ]
        images = (f"{name}/{seed}_0.jpg", f"{name}/{seed}_1.jpg")
        return forms.Record(messages=forms.checked_turns(turns), images=images, meta={"id": f"{name}/{seed}"})

    return _Pairs(file, options), parse


class _Pairs:
    def __init__(self, file: Path, options: EditOptions) -> None:
        self.file = file
        try:
            prompts = json.loads(file.read_bytes())
            found = [(str(name), [str(seed) for seed in seeds]) for name, seeds in prompts]
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror}") from None
        except (ValueError, TypeError) as error:
            raise DataError(f"{file}: is not a list of [name, [seeds]]: {error}") from None
        first, last = (math.floor(share * len(found)) for share in _SPLITS[options.split])
        most = 1 if options.pairs == "first" else None
        self.pairs = [(name, seed) for name, seeds in found[first:last] for seed in seeds[:most]]

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, number: int) -> Mapping[str, Any]:
        name, seed = self.pairs[number]
        return {"id": f"{name}/{seed}", "name": name, "seed": seed}

    def digest(self) -> str:
        return hashlib.sha256(self.file.read_bytes()).hexdigest()


def _edit(path: Path) -> str:
    try:
        edit = json.loads(path.read_bytes())["edit"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SampleError(f"{path.parent.name}/{path.name} tells no edit: {type(error).__name__}") from None
    if not isinstance(edit, str):
        raise SampleError(f"{path.parent.name}/{path.name}: the edit is no text")
    return edit.strip()
