"""What a model directory says of itself: the JSON files that decide its format, read once."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from mmit.errors import CheckpointError
from mmit.models.adapter_names import base_directory

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A model directory: ``config.json``, and ``mmit.json`` (empty in a directory that mmit did not write).

    base, tower: where the language model and the vision tower lie that the directory only names; empty where nobody
    said so.
    """

    directory: Path
    config: Json
    own: Json
    base: str = ""
    tower: str = ""

    def image_processor(self) -> Mapping[str, Any]:
        """Settings of the image processor: its own file (transformers 4), or part of ``processor_config.json`` (5)."""
        alone = self.directory / "preprocessor_config.json"
        if alone.is_file():
            return read_json(alone)
        joined = self.directory / "processor_config.json"
        if joined.is_file() and "image_processor" in (inside := read_json(joined)):
            return inside["image_processor"]
        raise CheckpointError(
            f"{self.directory} lacks preprocessor_config.json: the mean and std of its pixels are unknown"
        )

    def image_token(self) -> int:
        """The id of the image token. Both names occur in directories that transformers wrote."""
        for name in ("image_token_index", "image_token_id"):
            if isinstance(self.config.get(name), int):
                return self.config[name]
        raise CheckpointError(f"{self.directory}/config.json lacks image_token_index")

    def text_config(self) -> Json:
        """The language model's configuration. Raises CheckpointError where there is none."""
        found = self.config.get("text_config")
        if not isinstance(found, dict):
            raise CheckpointError(f"{self.directory}/config.json lacks text_config, which describes the language model")
        return found


@contextmanager
def buildable(directory: Path) -> Generator[None]:
    """While in force, what the libraries raise of impossible descriptions becomes a CheckpointError."""
    wrong = (ArithmeticError, AttributeError, KeyError, RuntimeError, StrictDataclassError, TypeError, ValueError)
    try:
        yield
    except wrong as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{directory}: config.json or mmit.json describes parts that cannot be built ({reason}); take a whole copy"
        ) from error


def read_contents(directory: Path, *, base: str = "", tower: str = "") -> Contents:
    """The contents of a model directory (see ``Contents``); where it holds an adapter, of what the adapter is beside.

    Raises CheckpointError for a file that is missing or damaged.
    """
    directory = base_directory(directory)
    own = directory / "mmit.json"
    return Contents(
        directory=directory,
        config=read_json(directory / "config.json"),
        own=read_json(own) if own.is_file() else {},
        base=base,
        tower=tower,
    )


def read_json(file: Path) -> Json:
    """A JSON file of a model directory. Raises CheckpointError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is damaged: it must hold one JSON object")
    return content


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file of a model directory, to be read by people too."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
