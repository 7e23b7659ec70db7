"""Source files are read record by record, and pictures below their root only."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_factories import bomb, llava_record, picture, write_source

from mmit.conversation import ImageRef
from mmit.data.faults import SampleError
from mmit.data.readers import Reader, open_reader
from mmit.data.rows import open_json, open_table
from mmit.errors import DataError


def reader(path: Path, kind: str = "llava_json", **more: Any) -> Reader:
    return open_reader(kind, path, name="set", **more)


@pytest.mark.parametrize("name", ["set.json", "set.jsonl"])
def test_a_list_and_lines_give_the_same_conversations(tmp_path: Path, name: str) -> None:
    found = reader(write_source(tmp_path, [llava_record(n, words=n + 1) for n in range(3)], name=name))
    assert len(found) == 3
    last = found.read(2)
    assert last.id == "set/00000002"
    assert last.meta == {"id": "r2"}
    assert last.messages[1].text == "red red red"
    assert (last.images, last.sizes) == ((picture(),), ((8, 6),))


def test_spans_of_a_json_list_are_its_elements(tmp_path: Path) -> None:
    records = [{"a": 'br[a]ces {} and "quotes" \\'}, {}, {"nested": [{"deep": ["]", {"x": "}"}]}], "é": "日本"}]
    for number, text in enumerate([json.dumps(records), json.dumps(records, indent=3, ensure_ascii=False)]):
        path = tmp_path / f"{number}.json"
        path.write_text("\ufeff \n" + text + "\n\n", encoding="utf-8")
        rows = open_json(path)
        assert [rows.read(n) for n in range(len(rows))] == records


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n {"a" 2}]', r"bad\.json:2:7: the JSON is broken: Expecting ':' delimiter"),
        ('[{"a": 1}\n {"a": 2}]', r"bad\.json:1:10: the JSON is broken: Expecting ',' delimiter"),
        ('[{"a": 1},\n {"a": 2', r"bad\.json:2:9: the JSON is broken: The list is not closed"),
        ('[{"a": "x}]', r"bad\.json:1:8: the JSON is broken: Unterminated string"),
        ('["a", "b"]', r"bad\.json:1:2: the list holds what is no object \{\.\.\.\}, and every record is one"),
        ("[1, 2]", r"bad\.json:1:2: the list holds what is no object"),
        ('[{"a": 1}, 2, {"a": 3}]', r"bad\.json:1:10: the list holds what is no object"),
        ('[{"a": 1},]', r"bad\.json:1:10: the JSON is broken: Expecting an object behind the ','"),
        ('[{"a": 1}] x', r"bad\.json:1:11: the JSON is broken: Extra data"),
        ('{"a": 1}\n{"é": "日本", "b" 1}', r"bad\.json:2:22: the JSON is broken: Expecting ':' delimiter"),
        ('{\n  "data": []\n}', r"bad\.json:1:2: .* holds one object per line"),
    ],
)
def test_broken_json_is_located_by_line_and_byte(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        [rows.read(n) for rows in [open_json(path)] for n in range(len(rows))]


def test_a_record_that_is_not_utf8_is_a_bad_record(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_bytes(b'{"a": "ok"}\n{"a": "\xff"}\n')
    rows = open_json(path)
    assert rows.read(0) == {"a": "ok"}
    with pytest.raises(SampleError, match="not UTF-8: invalid start byte at byte 19"):
        rows.read(1)


def test_a_table_may_quote_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text('image,caption\na.jpg,"two\nlines, ""quoted"""\nb.jpg,plain\nc.jpg\n', encoding="utf-8-sig")
    rows = open_table(path)
    assert len(rows) == 3
    assert rows.read(0) == {"image": "a.jpg", "caption": 'two\nlines, "quoted"'}
    assert rows.read(1) == {"image": "b.jpg", "caption": "plain"}
    with pytest.raises(SampleError, match=r"set\.csv:5 has 1 cells for 2 columns"):
        rows.read(2)


def test_captions_come_from_tables_json_and_folders(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.jpg").write_bytes(picture())
    (tmp_path / "deep" / "b.png").write_bytes(picture(kind="PNG"))
    (tmp_path / "deep" / "a.txt").write_text("A red square.\n")
    (tmp_path / "set.tsv").write_text("path\ttext\ndeep/a.jpg\tA red square.\n")
    (tmp_path / "set.jsonl").write_text('{"file_name": "deep/a.jpg", "text": "A red square."}\n')
    for source in ("set.tsv", "set.jsonl", "deep"):
        found = reader(tmp_path / source, "captions", prompt="Describe it.").read(0)
        assert [m.content for m in found.messages] == [(ImageRef(0), "Describe it."), ("A red square.",)]
        assert found.images == (picture(),)
    with pytest.raises(SampleError, match=r"b\.png has no caption: b\.txt is missing"):
        reader(tmp_path / "deep", "captions").read(1)


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("../../etc/passwd", "leads out of the image root"),
        ("/etc/passwd", "leads out of the image root"),
        ("file:///etc/passwd", "leads out of the image root"),
        ("out/b.jpg", "is a link that leads out of the image root"),
        ("missing.jpg", "is not below"),
        (".", "leads out of the image root"),
        ("a\0.jpg", "is no file name"),
        ("empty.jpg", "is an empty file"),
        ("words.jpg", "no image"),
        ("bomb.png", "more than"),
    ],
)
def test_pictures_that_may_not_or_cannot_be_read_are_bad_records(tmp_path: Path, reference: str, reason: str) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    source = write_source(inside, [llava_record(0, image=reference)])
    outside.mkdir()
    (outside / "b.jpg").write_bytes(picture())
    (inside / "out").symlink_to(outside)
    (inside / "empty.jpg").touch()
    (inside / "words.jpg").write_text("not a picture")
    (inside / "bomb.png").write_bytes(bomb())
    with pytest.raises(SampleError, match=reason):
        reader(source).read(0)


def test_links_out_of_the_root_are_read_where_that_is_allowed(tmp_path: Path) -> None:
    source = write_source(tmp_path / "in", [llava_record(0, image="out/a.jpg")])
    write_source(tmp_path / "out", [])
    (tmp_path / "in" / "out").symlink_to(tmp_path / "out")
    assert reader(source, follow_links=True).read(0).images == (picture(),)


def test_an_absolute_path_below_the_root_is_read(tmp_path: Path) -> None:
    source = write_source(tmp_path, [llava_record(0, image=str(tmp_path / "a.jpg"))])
    assert reader(source).read(0).sizes == ((8, 6),)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "there is no such file"), ("", "the file is empty"), ("[]", "finds no records")],
)
def test_a_source_that_is_missing_or_empty_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "set.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=rf"set\.json: .*{message}"):
        reader(path)


def test_the_names_of_the_readers_are_given_for_a_wrong_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no reader 'llava'; there are llava_json, messages, captions"):
        reader(tmp_path, "llava")
