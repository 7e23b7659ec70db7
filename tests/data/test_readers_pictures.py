"""Pictures under other names, missing ones, and boxes in the texts about them."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from data_factories import llava_record, talk, write_source
from recipe_factories import llava_turns

from mmit.conversation import Message
from mmit.data import forms
from mmit.data.convert import Conversion, convert
from mmit.data.faults import SampleError
from mmit.data.shards import Manifest
from mmit.data.sources import box_texts
from mmit.data.sources.names import PictureOptions, candidates, escaped
from mmit.errors import DataError

# ---------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["coco/000000000009.jpg"]),
        ({"extensions": ("gif", ".png")}, ["coco/000000000009.jpg", "coco/000000000009.gif", "coco/000000000009.png"]),
        ({"prefixes": {"vg/": "", "coco/": "train2017/"}}, ["train2017/000000000009.jpg"]),
        (
            {"coco_names": True},
            [
                "coco/000000000009.jpg",
                "coco/COCO_train2014_000000000009.jpg",
                "coco/COCO_val2014_000000000009.jpg",
            ],
        ),
    ],
)
def test_a_picture_is_looked_for_under_these_names(options: dict, names: list[str]) -> None:
    assert list(candidates("coco/000000000009.jpg", PictureOptions(**options))) == names


def test_info_zip_spells_other_characters_so() -> None:
    assert escaped("金 é😀.jpg") == "#U91d1 #U00e9#L01f600.jpg"


def test_a_missing_picture_is_left_out_and_counted_where_the_recipe_says_so(tmp_path: Path) -> None:
    records = [llava_record(0), llava_record(1, image="gone.jpg"), {**llava_record(2), "pcl": "a.npy"}]
    source = write_source(tmp_path / "source", records)
    made = Conversion(
        reader="llava_json",
        source=source,
        target=tmp_path / "shards",
        name="set",
        options={"missing_images": "skip", "skip_with": ["pcl"]},
        max_bad=0,
    )
    manifest = convert(made, processes=1, progress=False)
    assert manifest.totals["samples"] == 1
    assert (manifest.totals["skipped"], manifest.totals["bad"]) == (2, 0)
    assert manifest.skipped == {"a picture is missing": 1, "has 'pcl'": 1}
    assert Manifest.read(tmp_path / "shards").skipped == manifest.skipped
    with pytest.raises(DataError, match=r"1 bad records of 3 .*image 'gone.jpg' is not below"):
        convert(replace(made, options={"skip_with": ["pcl"]}, target=tmp_path / "t"), processes=1, progress=False)
    write_source(tmp_path / "source", records[1:])
    with pytest.raises(DataError, match=r"or skipped \(1: a picture is missing; 1: has 'pcl'\), nothing was written"):
        convert(replace(made, target=tmp_path / "u"), processes=1, progress=False)


# ---------------------------------------------------------------------------------------- boxes


def boxes_in(text: str, given: box_texts.Given, wanted: box_texts.Wanted = "keep") -> tuple[str, str]:
    messages, convention = box_texts.settle(talk(text, "x", images=1), [(80, 40)], given=given, wanted=wanted)
    return messages[0].text, convention


@pytest.mark.parametrize(
    ("text", "given", "wanted", "result"),
    [
        ("a [0.25, 0.375, 0.75, 0.625]", "xyxy01_padded", "keep", ("a [0.25, 0.375, 0.75, 0.625]", "xyxy01_padded")),
        ("a [0.25, 0.375, 0.75, 0.625]", "xyxy01_padded", "xyxy01", ("a [0.250, 0.250, 0.750, 0.750]", "xyxy01")),
        ("[0.25,0.25,0.75,0.75]", "xyxy01", "xyxy01_padded", ("[0.250, 0.375, 0.750, 0.625]", "xyxy01_padded")),
        ("20 10 60 30.", "xyxy_px", "keep", ("[0.250, 0.250, 0.750, 0.750].", "xyxy01")),
        ("[20.0, 10, 40, 20]", "xywh_px", "keep", ("[0.250, 0.250, 0.750, 0.750]", "xyxy01")),
        ("x: 20, y: 10, width: 40, height: 20", "xywh_px", "keep", ("[0.250, 0.250, 0.750, 0.750]", "xyxy01")),
        ("at 1 2 3 4 5", "xyxy_px", "keep", ("at 1 2 3 4 5", "")),  # five numbers are no box
        ("[1, 2, 3]", "xyxy01", "keep", ("[1, 2, 3]", "")),
        ("a [0.25, 0.375, 0.75, 0.625]", "none", "xyxy01", ("a [0.25, 0.375, 0.75, 0.625]", "")),
    ],
)
def test_boxes_are_found_and_written_in_one_convention(
    text: str, given: box_texts.Given, wanted: box_texts.Wanted, result: tuple[str, str]
) -> None:
    assert boxes_in(text, given, wanted) == result


def test_a_box_that_cannot_be_placed_is_a_bad_record() -> None:
    with pytest.raises(SampleError, match="reaches from"):
        boxes_in("[0.25, 0.0, 0.75, 0.9]", "xyxy01_padded", "xyxy01")  # above the picture in its square
    with pytest.raises(SampleError, match="2 pictures: which one it is in is not said"):
        box_texts.settle(talk("1 2 3 4", "x", images=2), [(8, 6), (8, 6)], given="xyxy_px", wanted="keep")


def test_every_message_of_a_form_without_boxes_is_left_alone() -> None:
    # the stored meta of a record may not claim boxes that its texts do not have
    found: Mapping = forms.llava({"id": "1", "conversations": llava_turns("Q?", "A.")}).meta
    assert "boxes" not in found
    messages: tuple[Message, ...] = talk("Q?", "A.")
    assert box_texts.settle(messages, [], given="xyxy01", wanted="xyxy01_padded") == (messages, "")
