"""Looking at shards: every fault is counted and placed, and a sample is shown as it will be trained."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from data_factories import make_shards, picture, talk
from factories import tiny_llama_tokenizer
from rich.console import Console
from test_shards import write_tar

from mmit.conversation import Conversation
from mmit.data.check import Depth, check
from mmit.data.findings import Report
from mmit.data.shards import ShardWriter
from mmit.data.show import TRAINED, show, text_view
from mmit.errors import DataError


def checked(path: Path, *, decode: bool = False, processes: int = 1, **more: Any) -> Report:
    against = more.pop("against", ())
    return check(path, Depth(decode=decode, processes=processes, progress=False, **more), against=against)


def rewritten(tar: Path, changes: dict[str, bytes]) -> None:
    """The tar with the content of some members changed."""
    with tarfile.open(tar) as old:
        members = {member.name: old.extractfile(member) for member in old}
        write_tar(tar, {name: changes.get(name, file.read() if file else b"") for name, file in members.items()})


@pytest.mark.parametrize("processes", [1, 2])
def test_whole_shards_have_no_fault(tmp_path: Path, processes: int) -> None:
    found = checked(make_shards(tmp_path, 12, lengths=range(1, 13)).directory, decode=True, processes=processes)
    assert (found.samples, found.images, found.text_only) == (12, 8, 4)
    assert (dict(found.faults), found.exit_code) == ({}, 0)


def test_every_fault_is_counted_and_placed(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, 12)
    keys = [shards.place(number)[1] for number in range(5)]
    with_image = [key for number, key in enumerate(keys) if shards.read(number).images]
    rewritten(
        shards.tars[0],
        {
            f"{with_image[0]}.0.jpg": picture(9, 9),  # the JSON says 8 x 6
            f"{with_image[1]}.0.jpg": b"no picture",
            f"{keys[2]}.json": b"{",
        },
    )
    content = shards.tars[1].read_bytes()
    shards.tars[1].write_bytes(content[: len(content) // 2 // 512 * 512])
    shards.tars[2].unlink()
    with ShardWriter(shards.directory / "stray.tar") as stray:
        stray.write(keys[0], Conversation(id="x", messages=talk("a", "b")))
        stray.finish()
    found = checked(shards.directory)
    assert found.exit_code == 1
    reasons = " | ".join(f"{kind} {count}" for kind, count in found.faults.items())
    for reason in (
        "an image is not of the size that its JSON states 1",
        "its JSON is broken",
        "the shard is missing 1",
        "is not in the manifest 1",
        "its content is not what the manifest says (SHA-…) 2",
        "comes in … and … 1",
        "no image PIL can read",
    ):
        assert reason in reasons, reason
    assert any("stray.tar: is not in the manifest" in place for place in found.places["is not in the manifest"])
    screen = Console(file=io.StringIO(), width=200)
    screen.print(found.table())
    assert isinstance(screen.file, io.StringIO)
    assert "the shard is missing" in screen.file.getvalue()


def test_faults_that_differ_in_numbers_and_names_are_one_kind(tmp_path: Path) -> None:
    report = Report()
    for number in range(5):
        report.add(f"s.tar: k{number}", f"turn {number} of 'a{number}' is empty")
    assert dict(report.faults) == {"turn … of … is empty": 5}
    assert len(report.places["turn … of … is empty"]) == 3


def test_totals_that_do_not_add_up_are_a_fault(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, 3, lengths=range(1, 4))
    path = shards.directory / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["totals"]["images"] = 7
    path.write_text(json.dumps(manifest))
    assert dict(checked(shards.directory).faults) == {"says … images and there are …": 1}


def test_only_decoding_finds_a_picture_that_breaks_off(tmp_path: Path) -> None:
    whole = picture(640, 480)
    for name, image in (("whole", whole), ("cut", whole[: len(whole) // 2])):
        (tmp_path / name).mkdir()
        with ShardWriter(tmp_path / name / "s.tar") as shard:
            shard.write(
                "k", Conversation(id="x", messages=talk("a", "b", images=1), images=(image,), sizes=((640, 480),))
            )
            shard.finish()
    assert checked(tmp_path / "cut").exit_code == 0
    assert checked(tmp_path / "whole", decode=True).exit_code == 0
    assert checked(tmp_path / "cut", decode=True).exit_code == 1


def test_a_folder_without_shards_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are no shards"):
        checked(tmp_path)


def test_a_sample_is_shown_with_its_trained_tokens_coloured(tmp_path: Path) -> None:
    tiny_llama_tokenizer(tmp_path / "tokenizer")
    shards = make_shards(tmp_path, 3)
    number = next(n for n in range(3) if shards.read(n).images)
    view = text_view(str(tmp_path / "tokenizer"), template="vicuna", image_tokens=9)
    (text,) = show(shards.directory, view, samples=[number])
    assert f"({shards.read(number).id}); images: 8 x 6;" in text.plain
    assert "<image> x 9" in text.plain
    answer = shards.read(number).messages[1].text
    trained = "".join(text.plain[span.start : span.end] for span in text.spans if span.style == TRAINED)
    assert trained == f" {answer}</s>"
    with pytest.raises(DataError, match="there is no sample 3; the shards hold 0 to 2"):
        list(show(shards.directory, view, samples=[3]))
