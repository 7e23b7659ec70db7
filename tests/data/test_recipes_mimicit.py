"""MIMIC-IT: related instructions and several pictures mean what the group says."""

import base64
from pathlib import Path
from typing import Any

import pytest
from data_factories import picture
from recipe_factories import lay_out, published, shown, write_parquet

from mmit.data.faults import SampleError
from mmit.data.recipe import load_recipe


def instruction(text: str, images: list[str], related: list[str]) -> dict:
    return {"instruction": text, "answer": f"{text}!", "image_ids": images, "rel_ins_ids": related}


def mimicit(root: Path, name: str, data: dict, more: dict) -> None:
    recipe = load_recipe(name, root=root)
    lay_out(root, {recipe.source: {"meta": {"version": "0.0.1"}, "data": data}})
    lay_out((root / recipe.source).parent, more)


def test_mimicit_related_instructions_are_earlier_turns_about_the_same_picture(tmp_path: Path) -> None:
    data = {
        "LACONV_00_INS_1": instruction("One", ["LA_00_IMG_1"], []),
        "LACONV_00_INS_2": instruction("Two", ["LA_00_IMG_1"], ["LACONV_00_INS_9"]),
    }
    url_safe = base64.urlsafe_b64encode(picture()).decode()
    relations = {"LACONV_00_INS_2": ["LACONV_00_INS_1", "LACONV_00_INS_2"], "LACONV_00_INS_1": []}
    more = {"LA.json": {"LA_00_IMG_0": "x", "LA_00_IMG_1": url_safe}, "LACONV_train.json": relations}
    mimicit(tmp_path, "mimicit_la_conversation", data, more)
    reader = published("mimicit_la_conversation", tmp_path, None)
    assert shown(reader, 0) == ["<0>One", "One!"]
    assert shown(reader, 1) == ["<0>One", "One!", "Two", "Two!"]  # the relations of XX_train.json count
    assert reader.read(1).images == (picture(),)
    assert reader.read(1).meta == {"id": "LACONV_00_INS_2", "task": "LACONV"}


def test_mimicit_examples_in_context_have_pictures_of_their_own(tmp_path: Path) -> None:
    data = {f"I{n}": instruction(f"Q{n}", [f"P{n}"], [f"I{(n + 1) % 3}"]) for n in range(3)}
    pictures = {f"P{n}": base64.b64encode(picture(8, 6 + n)).decode() for n in range(3)}
    relations = {"I0": ["I2"], "I1": ["I9"], "I2": []}
    mimicit(tmp_path, "mimicit_la_in_context", data, {"LA.json": pictures, "LACR_T2T_train.json": relations})
    reader = published("mimicit_la_in_context", tmp_path, None)
    assert shown(reader, 0) == ["<0>Q2", "Q2!", "<1>Q0", "Q0!"]
    assert reader.read(0).sizes == ((8, 8), (8, 6))
    with pytest.raises(SampleError, match="the related instruction 'I9' is not in the file"):
        reader.read(1)


def test_mimicit_videos_are_frames_from_parquet(tmp_path: Path) -> None:
    ids = [f"DC_IMG_v_N1c3C_{n:04d}" for n in range(20)]
    mimicit(tmp_path, "mimicit_dense_captions", {"DC_INS_00001": instruction("What happens?", ids, [])}, {})
    rows = [{"base64": base64.b64encode(picture(8, 1 + n)).decode(), "__index_level_0__": i} for n, i in enumerate(ids)]
    write_parquet(tmp_path / "data/mimicit/DC.parquet", rows, group=3)
    reader = published("mimicit_dense_captions", tmp_path, None, frames=4)
    assert shown(reader) == ["<0><1><2><3>What happens?", "What happens?!"]
    # 20 frames in 4 stretches of 5: the middles are 2, 7, 12, 17
    assert [height - 1 for _, height in reader.read(0).sizes] == [2, 7, 12, 17]


def test_mimicit_text_only_and_a_folder_of_pictures(tmp_path: Path) -> None:
    mimicit(tmp_path, "mimicit_dense_captions", {"I1": instruction("Why?", [], [])}, {"P1.jpg": (8, 6)})
    recipe: dict[str, Any] = {"pictures": "", "relations": ""}
    assert shown(published("mimicit_dense_captions", tmp_path, None, group="text_only", **recipe)) == ["Why?", "Why?!"]
    with pytest.raises(SampleError, match="no image_ids, which the group image_text needs"):
        published("mimicit_dense_captions", tmp_path, None, group="image_text", **recipe).read(0)
    mimicit(tmp_path, "mimicit_dense_captions", {"I1": instruction("Why?", ["P1"], [])}, {})
    reader = published("mimicit_dense_captions", tmp_path, None, group="image_text", **recipe)
    assert shown(reader) == ["<0>Why?", "Why?!"]
