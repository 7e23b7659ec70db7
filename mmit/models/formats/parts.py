"""The run-file sections of encoder and connector as ``mmit.json`` keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmit.models.formats.contents import Contents, Json

INSTRUCTION_TOKENIZER = "qformer_tokenizer"
"""Folder of a model directory with the tokenizer of a connector that reads instructions; transformers' name for it."""


def section_of(contents: Contents, part: str, *, default: Mapping[str, Any]) -> Json:
    """The run-file section of a part that ``mmit.json`` keeps, else ``default``."""
    section = dict(contents.own.get(part) or default)
    if section.get("instruction") and section["type"] == "qformer":
        inside = str(contents.directory / INSTRUCTION_TOKENIZER)
        section["instruction"] = {**section["instruction"], "tokenizer": inside}
    return section


def connector_inside(section: Mapping[str, Any]) -> Json:
    """A connector's section for a directory that holds its weights and its tokenizer: no path leads outside."""
    kept = dict(section)
    if kept.get("type") == "qformer":
        kept["pretrained"] = ""
        if kept.get("instruction"):
            kept["instruction"] = {**kept["instruction"], "tokenizer": INSTRUCTION_TOKENIZER}
    return kept
