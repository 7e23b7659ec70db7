"""What the readers of published sets share: JSON parts, Parquet, templates, choices, a reader of one's own."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_factories import picture
from hypothesis import given
from hypothesis import strategies as st
from recipe_factories import lay_out, llava_turns, opened, published, shown

from mmit.data.convert import Conversion, convert
from mmit.data.faults import SampleError, SkippedError
from mmit.data.order import key, windowed
from mmit.data.readers import open_reader
from mmit.data.recipe import load_recipe
from mmit.data.shard_set import open_source
from mmit.data.sources.choices import read_choices
from mmit.data.sources.json_parts import JsonParts
from mmit.data.sources.sampling import evenly
from mmit.data.sources.templates import fill
from mmit.errors import DataError, MissingExtra

# ---------------------------------------------------------------------------------------- JSON parts


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
), st.sampled_from([None, 1]))  # fmt: skip
def test_parts_of_a_json_file_are_those_of_the_standard_parser(
    tmp_path_factory: pytest.TempPathFactory, value: object, indent: int | None
) -> None:
    path = tmp_path_factory.getbasetemp() / "parts.json"
    path.write_text(json.dumps({"info": {"here": [1]}, "here": value, "after": 3}, indent=indent), encoding="utf-8")
    if isinstance(value, list):
        assert [found for _, found in JsonParts(path, "here").items()] == value
    elif isinstance(value, dict):
        parts = JsonParts(path, "here")
        assert dict(parts.items()) == value
        assert parts.names() == list(value)
    else:
        with pytest.raises(DataError, match="has no list or object 'here'; it has info, here"):
            JsonParts(path, "here")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"data": [{"a": 1}', "ends inside a list or object; was it downloaded whole"),
        ('{"data": [{"a": "x}]}', "a string is not closed"),
        ('{"other": [], "x": 1}', "has no list or object 'data'; it has other, x"),
        ("[1]", "begins with no object that could hold 'data'"),
        ("", "the file is empty"),
    ],
)
def test_a_broken_annotation_file_is_an_error_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=rf"a\.json: .*{message}"):
        JsonParts(tmp_path / "a.json", "data")


# ---------------------------------------------------------------------------------------- Parquet


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 4), st.integers(0, 5))
def test_blocks_are_shuffled_whole_and_mixed_within_a_window(blocks: list[int], window: int, seed: int) -> None:
    order = windowed(blocks, key(seed), window=window)
    assert sorted(order.tolist()) == list(range(sum(blocks)))
    block_of = np.repeat(np.arange(len(blocks)), blocks)
    seen: list[int] = []
    for number in order:  # a reader that keeps `window` blocks never needs one that it has let go
        if block_of[number] in seen:
            assert block_of[number] in seen[-window:]
        else:
            seen.append(int(block_of[number]))


def parquet_rows(path: Path, count: int, group: int) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [
        {
            "id": f"r{n}",
            "image": {"bytes": picture(8, 6 + n), "path": None},
            "conversations": llava_turns("Q?", f"A{n}"),
        }
        for n in range(count)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=group)


def test_parquet_becomes_shards_whole_and_the_same_with_one_process_or_two(tmp_path: Path) -> None:
    parquet_rows(tmp_path / "set" / "a.parquet", 30, 4)
    parquet_rows(tmp_path / "set" / "deep" / "b.parquet", 7, 7)
    made = Conversion(reader="rows", source=tmp_path / "set", target=tmp_path / "one", name="set", shard_samples=10)
    convert(made, processes=1, progress=False)
    convert(replace(made, target=tmp_path / "two"), processes=2, progress=False)
    shards = open_source(tmp_path / "one")
    found = sorted((one.id, one.messages[1].text, one.sizes[0][1]) for one in map(shards.read, range(len(shards))))
    assert found == [(f"set/{n:08d}", f"A{n % 30}", 6 + n % 30) for n in range(37)]
    for name in ("shard-000000.tar", "shard-000003.tar"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_parquet_that_is_none_or_without_its_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as Parquet"):
        open_reader("rows", tmp_path, name="set")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"there is no \*\.parquet file"):
        open_reader("rows", tmp_path / "empty", name="set")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"needs the package 'pyarrow': pip install 'mmit\[parquet\]'"):
        open_reader("rows", tmp_path, name="set")


# ---------------------------------------------------------------------------------------- templates and choices


def test_templates_know_three_forms_and_no_more() -> None:
    record = {"a": "x", "Choice A": 3, "empty": " ", "none": None}
    assert fill("{a} {Choice A:04d} {empty|N/A} {none|} {gone|-}", record) == "x 0003 N/A  -"
    assert fill("{a.__class__} {0} {{a}}", {**record, "a.__class__": "plain"}) == "plain {0} {x}"
    with pytest.raises(SampleError, match="has no 'gone'; it has a, Choice A, empty"):
        fill("{gone}", record)
    with pytest.raises(SampleError, match="'a' is 'x', not a number"):
        fill("{a:04d}", record)


@pytest.mark.parametrize(
    ("choices", "answer", "label", "right"),
    [
        (["a frog", "a cat"], 1, None, 1),
        (["A: a frog", " B:a cat"], "a cat", None, 1),
        (["A: a frog", " B:a cat"], "b", None, 1),
        (["B", "A"], "A", None, 1),  # the text of a choice counts before its letter
        (["yes", "yes"], "yes", "B", 1),
    ],
)
def test_the_right_choice_is_found_by_number_text_or_letter(
    choices: list[str], answer: object, label: str | None, right: int
) -> None:
    assert read_choices({"c": choices}, ["c"], answer=answer, label=label).right == right


@pytest.mark.parametrize(
    ("choices", "answer", "reason"),
    [
        (["a", "b"], 2, "is none of"),
        (["a", "b"], None, "is none of"),
        (["yes", "yes"], "yes", "is several of"),
        ("a, b", "a", "are not a list of texts"),
        (["a", None], "a", "are not a list of texts"),
    ],
)
def test_an_answer_that_is_no_choice_is_a_bad_record(choices: object, answer: object, reason: str) -> None:
    with pytest.raises(SampleError, match=reason):
        read_choices({"c": choices}, ["c"], answer=answer, label=None)


def test_frames_are_the_middles_of_equal_stretches() -> None:
    assert evenly(3, 8) == [0, 1, 2]
    assert evenly(12, 3) == [2, 6, 10]
    assert evenly(10, 1) == [5]


# ---------------------------------------------------------------------------------------- plain tables, one's own


def test_a_table_of_ones_own_columns_and_an_empty_answer(tmp_path: Path) -> None:
    text = 'file,ask,reply,set\na.jpg,"What is it?",A cat.,x\na.jpg,And?,,x\na.jpg,And?,Red.,y\n'
    lay_out(tmp_path, {"set.csv": text, "a.jpg": (8, 6)})
    options = {"image": "{file}", "question": "{ask}", "answer": "{reply|}", "empty_answers": "skip",
               "only": {"set": ["x"]}, "system": "Be brief."}  # fmt: skip
    reader = open_reader("table", tmp_path / "set.csv", name="set", options=options)
    assert shown(reader) == ["Be brief.", "<0>What is it?", "A cat."]
    with pytest.raises(SkippedError, match="the answer is empty"):
        reader.read(1)
    with pytest.raises(SkippedError, match="'set' is 'y'"):
        reader.read(2)
    with pytest.raises(SampleError, match=r"turn 3 \(assistant\) is empty"):
        open_reader("table", tmp_path / "set.csv", name="set", options={**options, "empty_answers": "error"}).read(1)


def test_pictures_with_qa_pairs_are_conversations(tmp_path: Path) -> None:
    record = {"image": "train2014/COCO_train2014_000000000030.jpg", "QA": [{"q": "What?", "a": "A vase."}]}
    reader = published("llava_onevision_raw", tmp_path, [record], {record["image"]: (8, 6)})
    assert shown(reader) == ["<0>What?", "A vase."]


OWN = """
def read(source, greeting="Hello"):
    for line in source.read_text().splitlines():
        yield {"id": line, "image": "a.jpg", "conversations": [
            {"from": "human", "value": greeting}, {"from": "gpt", "value": line}]}

def broken(source):
    return 3
"""


def test_ones_own_reader_is_a_function_named_in_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    lay_out(tmp_path, {"my_own_reader.py": OWN, "set/a.jpg": (8, 6), "set/set.txt": "one\ntwo\n"})
    recipe = "name: own\nreader: my_own_reader:{}\nsource: set/set.txt\nshards: s\n"
    Path("own.yaml").write_text(recipe.format("read") + "options: {greeting: Hi, coco_names: true}\n")
    reader = opened(load_recipe("own.yaml"))
    assert [shown(reader, number) for number in range(2)] == [["<0>Hi", "one"], ["<0>Hi", "two"]]
    assert reader.read(1).meta == {"id": "two"}
    for name, reason in [("gone", "the module my_own_reader has no 'gone'"), ("broken", "gave int; it has to give")]:
        Path("own.yaml").write_text(recipe.format(name))
        with pytest.raises(DataError, match=reason):
            opened(load_recipe("own.yaml"))
    with pytest.raises(DataError, match="there is no module 'no_such_module' here"):
        open_reader("no_such_module:read", Path("set/set.txt"), name="own")
