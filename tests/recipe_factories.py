"""A shipped recipe over small files in the literal published form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from data_factories import picture

from mmit.conversation import ImageRef
from mmit.data.readers import Reader, open_reader
from mmit.data.recipe import Recipe, load_recipe


def lay_out(root: Path, files: Mapping[str, Any]) -> None:
    """Write files: pictures are (width, height), bytes and texts as they are, everything else as JSON."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, tuple):
            path.write_bytes(picture(*content))
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def published(name: str, root: Path, source: Any, files: Mapping[str, Any] | None = None, **changed: Any) -> Reader:
    """The reader of recipe ``name`` over ``source`` (None: already there) and ``files`` below its image root."""
    recipe = load_recipe(name, root=root)
    if source is not None:
        lay_out(root, {recipe.source: source})
    lay_out(root / (recipe.images or Path(recipe.source).parent), files or {})
    return opened(replace(recipe, options={**recipe.options, **changed}))


def opened(recipe: Recipe) -> Reader:
    """What ``convert`` would read."""
    made = recipe.conversion()
    return open_reader(
        made.reader,
        made.source,
        name=made.name,
        images=made.images,
        prompt=made.prompt,
        follow_links=made.follow_links,
        options=made.options,
    )


def shown(reader: Reader, number: int = 0) -> list[str]:
    """The turns of a conversation as texts, pictures as <0>, <1>, ..."""
    return [
        "".join(f"<{part.index}>" if isinstance(part, ImageRef) else part for part in message.content)
        for message in reader.read(number).messages
    ]


def llava_turns(*texts: str) -> list[dict[str, str]]:
    """Questions and answers in LLaVA's form."""
    return [{"from": "gpt" if number % 2 else "human", "value": text} for number, text in enumerate(texts)]


def write_parquet(path: Path, rows: list[dict], *, group: int = 100) -> None:
    """A Parquet file of ``rows``, ``group`` to a row group; skips the test where pyarrow is not there."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=group)
