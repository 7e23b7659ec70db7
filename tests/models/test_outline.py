"""The outline of a model says about samples what the model says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mmit.config import ComposedModel, Data, WholeModel
from mmit.models import LoadedModel, Outline, read_outline, save_model
from mmit.train.feed import make_encode

DATA = Data.model_validate({"mix": [{"shards": "s"}]})


def same(one: LoadedModel | Outline, two: LoadedModel | Outline) -> bool:
    told = [(m.spec, m.image_id, m.pad_id, m.style, make_encode(DATA, m).fingerprint()) for m in (one, two)]
    return told[0] == told[1]


@pytest.mark.parametrize("kind", ["clip_llama", "siglip_qwen2"])
def test_an_outline_encodes_as_the_whole_model_does(
    kind: str, sections: dict[str, ComposedModel], build: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    loaded = build(kind)
    assert same(read_outline(sections[kind]), loaded)
    save_model(loaded, None, tmp_path / "model", made_from={})
    assert same(read_outline(WholeModel(path=str(tmp_path / "model"))), loaded)


def test_an_outline_reads_no_weight_of_the_language_model(sections: dict[str, ComposedModel], tmp_path: Path) -> None:
    section = sections["clip_llama"]
    bare = tmp_path / "llm"
    bare.mkdir()
    for file in Path(section.language_model.path).iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    language_model = section.language_model.model_copy(update={"path": str(bare)})
    found = read_outline(section.model_copy(update={"language_model": language_model}))
    assert found.spec == read_outline(section).spec
