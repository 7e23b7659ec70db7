"""One's own table and folder of pictures: what is understood, and the one sentence that each mistake gets."""

from pathlib import Path

import pytest
from data_factories import picture
from typer.testing import CliRunner

from mmit.cli_data import app
from mmit.conversation import ImageRef
from mmit.data.faults import SampleError
from mmit.data.readers import Reader, open_reader
from mmit.data.sources.own import fitting_reader
from mmit.errors import DataError

TABLE = """image,question,answer,room
a.jpg,What is broken?,The hinge.,hall
b c.JPG,"Is it old?","Yes, very.",cellar
a.jpg,<image> How old is it?,Ten years.,hall
,What is a hinge?,A joint.,none
,What is a door?,A way in.,none
"""


def table(folder: Path, text: str | bytes = TABLE, name: str = "mine.csv") -> Path:
    (folder / "photos").mkdir(exist_ok=True)
    for file in ("a.jpg", "b c.JPG"):
        (folder / "photos" / file).write_bytes(picture())
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def reader(path: Path) -> Reader:
    return open_reader(fitting_reader(path), path, name="mine", images=path.parent / "photos")


def texts(found: Reader, number: int) -> list[tuple]:
    return [message.content for message in found.read(number).messages]


def test_questions_about_the_same_picture_are_one_conversation_and_rows_without_one_are_text(tmp_path: Path) -> None:
    found = reader(table(tmp_path))
    assert len(found) == 4
    first = [(ImageRef(0), "What is broken?"), ("The hinge.",), ("How old is it?",), ("Ten years.",)]
    assert texts(found, 0) == first
    assert found.read(0).meta["room"] == "hall"
    assert texts(found, 1) == [(ImageRef(0), "Is it old?"), ("Yes, very.",)]
    assert [texts(found, number)[0] for number in (2, 3)] == [("What is a hinge?",), ("What is a door?",)]
    alone = open_reader(
        "questions", tmp_path / "mine.csv", name="mine", images=tmp_path / "photos", options={"max_turns": 1}
    )
    assert len(alone) == 5


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mine.csv", "Image; Question ;Answer\na.jpg;Was?;Ja, 3,5 cm\n".encode("utf-8-sig")),
        ("mine.tsv", b"filename\tprompt\tresponse\n a.jpg \tWas?\tJa, 3,5 cm\n"),
        ("mine.json", b'[{"image": "a.jpg", "question": "Was?", "answer": "Ja, 3,5 cm"}]'),
        ("mine.jsonl", b'{"image": "a.jpg", "messages": [{"role": "user", "content": "Was?"}, '
         b'{"role": "assistant", "content": "Ja, 3,5 cm"}]}\n'),
    ],
)  # fmt: skip
def test_tables_of_excel_and_other_spellings_read_the_same(tmp_path: Path, name: str, text: bytes) -> None:
    assert texts(reader(table(tmp_path, text, name)), 0) == [(ImageRef(0), "Was?"), ("Ja, 3,5 cm",)]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"foto,text\na.jpg,x\n", "names the columns foto, text; call them image, question and answer, or image"),
        (b"", "mine.csv: has no rows below the line of column names"),
        (b"image,question,answer\n", "has no rows below the line of column names"),
        ("image,question,answer\na.jpg,Schön?,Ja\n".encode("cp1252"), "byte 22 is not UTF-8; save the table as UTF-8"),
        ("image,question,answer\na.jpg,Why?,So\n".encode("utf-16"), "byte 0 is not UTF-8; save the table as UTF-8"),
        (b'image,question,answer\na.jpg,"Why?,So\n', "mine.csv:2: the table is broken: unexpected end of data"),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_read_gets_a_sentence(tmp_path: Path, text: bytes, sentence: str) -> None:
    with pytest.raises(DataError) as told:
        reader(table(tmp_path, text))
    assert sentence in str(told.value)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("B C.jpg,Why?,So", "image 'B C.jpg' is not below .*; there is 'b c.JPG'"),
        ("a,Why?,So", "image 'a' is not below .*; there is 'a.jpg'"),
        ("gone.jpg,Why?,So", r"image 'gone.jpg' is not below [^;]*$"),
        (",,So", r"turn 1 \(user\) is empty"),
        ("a.jpg,Why?,", r"turn 2 \(assistant\) is empty"),
        ("a.jpg,Why?", "has 2 cells for 3 columns"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(tmp_path: Path, row: str, sentence: str) -> None:
    found = reader(table(tmp_path, f"image,question,answer\n,Who?,I\n{row}\n"))
    with pytest.raises(SampleError, match=sentence):
        found.read(1)


def test_the_command_takes_the_table_as_it_is(tmp_path: Path) -> None:
    path = table(tmp_path)
    words = ["convert", str(path), "--images", str(tmp_path / "photos"), "--out", str(tmp_path / "shards")]
    done = CliRunner().invoke(app, [*words, "--processes", "1"])
    assert done.exit_code == 0, done.output
    assert "4 samples" in done.output
