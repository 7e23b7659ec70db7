"""Shards: plain webdataset tars, indexed, read by number, refused when they are not whole."""

import gc
import io
import json
import os
import pickle
import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_factories import make_shards, picture, talk

from mmit.conversation import Conversation, ImageRef, Message
from mmit.data import index, shard_files, stored
from mmit.data.faults import SampleError, StorageError
from mmit.data.shard_set import open_source
from mmit.data.shards import ShardWriter
from mmit.errors import DataError


def conversation(images: int = 1, kind: str = "JPEG") -> Conversation:
    pictures = tuple(picture(8 + n, 6, kind=kind) for n in range(images))
    return Conversation(
        id="set/1",
        messages=talk("What?", "Red, <image> and é日.", images=images),
        images=pictures,
        sizes=tuple((8 + n, 6) for n in range(images)),
        meta={"id": "x"},
    )


def write_tar(path: Path, members: dict[str, bytes], **more: Any) -> Path:
    """A tar as another program would write it."""
    with tarfile.open(path, "w", **more) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("a.tar", "b.tar"):
        with ShardWriter(tmp_path / name) as shard:
            shard.write("k1", conversation())
            info = shard.finish()
        contents.append(((tmp_path / name).read_bytes(), info.sha256, info.index, info.bytes))
    assert contents[0] == contents[1]
    assert contents[0][3] == len(contents[0][0])


def test_pictures_are_stored_as_they_came_and_come_back_in_order_beyond_ten(tmp_path: Path) -> None:
    # in the tar 10.png stands before 2.png
    made = conversation(12, "PNG")
    with ShardWriter(tmp_path / "s.tar") as shard:
        shard.write("k", made)
        shard.finish()
    found = open_source(tmp_path / "s.tar").read(0)
    assert found.images == made.images
    assert found.sizes == made.sizes
    assert found.messages == made.messages


def test_an_unfinished_shard_leaves_nothing(tmp_path: Path) -> None:
    with suppress(RuntimeError), ShardWriter(tmp_path / "s.tar") as shard:
        shard.write("k", conversation())
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def write_many(path: Path) -> None:
    with ShardWriter(path) as shard:
        for number in range(100):
            shard.write(f"{number}", conversation())
        shard.finish()


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(DataError, match=r"s\.tar: no space left"):
            write_many(tmp_path / "s.tar")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset's own
def test_webdataset_reads_every_sample_as_we_do(tmp_path: Path) -> None:
    from webdataset.compat import WebDataset

    shards = make_shards(tmp_path, 12)
    ours = [shards.read(number) for number in range(12)]
    theirs = list(WebDataset([str(tar) for tar in shards.tars], shardshuffle=False, empty_check=False))
    gc.collect()
    assert [sample["__key__"] for sample in theirs] == [shards.place(number)[1] for number in range(12)]
    for mine, other in zip(ours, theirs, strict=True):
        assert other["json"] == stored.to_json(mine)
        assert tuple(other[name] for name in sorted(other) if name.endswith("jpg")) == mine.images


def test_reading_the_text_alone_gives_the_same_but_for_the_bytes(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, 6)
    for number in range(6):
        whole, text = shards.read(number), shards.read_text(number)
        assert (text.messages, text.sizes, text.id, text.images) == (whole.messages, whole.sizes, whole.id, ())


def test_a_sample_costs_one_read_for_its_json_and_one_for_its_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = make_shards(tmp_path, 6)
    calls: list[int] = []
    real = os.pread

    def counted(file: int, count: int, offset: int) -> bytes:
        calls.append(count)
        return real(file, count, offset)

    monkeypatch.setattr(os, "pread", counted)
    for number in range(6):
        shards.read(number)
    assert len(calls) == len(shards) + int(shards.images.sum()) == 10


def test_shards_can_be_pickled_and_read_elsewhere(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, 6)
    copy = pickle.loads(pickle.dumps(shards))
    assert copy.read(3) == shards.read(3)
    assert copy.fingerprint == shards.fingerprint
    assert len(pickle.dumps(shards)) < 5000


def test_an_io_error_is_tried_again_and_then_final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = make_shards(tmp_path, 3)
    real, failures = os.pread, [2]

    def failing(file: int, count: int, offset: int) -> bytes:
        if failures[0]:
            failures[0] -= 1
            raise OSError(5, "Input/output error")
        return real(file, count, offset)

    monkeypatch.setattr(shard_files.time, "sleep", lambda _: None)
    monkeypatch.setattr(os, "pread", failing)
    assert shards.read(0).messages
    failures[0] = 100
    with pytest.raises(StorageError, match=r"shard-000000\.tar: cannot be read \(Input/output error\), tried 4 times"):
        shards.read(0)


# ---------------------------------------------------------------------------------------- other people's tars


CAPTION = {"a/x1.jpg": picture(), "a/x1.txt": b"A red square.\n", "a/x1.json": b'{"url": "u", "caption": "other"}'}
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
MESSAGES = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Red."}]


@pytest.mark.parametrize(
    ("members", "content"),
    [
        (CAPTION, [(ImageRef(0),), ("A red square.",)]),  # as img2dataset writes: the txt is the caption
        ({"x.jpg": picture(), "x.json": b'{"caption": "Red."}'}, [(ImageRef(0),), ("Red.",)]),
        (
            {
                "x.png": picture(kind="PNG"),
                "x.json": json.dumps({"image": "coco/1.jpg", "conversations": TURNS}).encode(),
            },
            [(ImageRef(0), "What?"), ("Red.",)],
        ),
        (
            {"x.jpg": picture(), "x.json": json.dumps({"messages": MESSAGES}).encode(), "x.cls": b"3"},
            [(ImageRef(0), "What?"), ("Red.",)],
        ),
        ({"x.json": json.dumps({"messages": MESSAGES}).encode()}, [("What?",), ("Red.",)]),
        ({"x.json": json.dumps({"messages": MESSAGES, "images": []}).encode()}, [("What?",), ("Red.",)]),
    ],
)
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_foreign_tars_that_follow_the_convention_are_read_as_they_are(
    tmp_path: Path, members: dict[str, bytes], content: list, form: int
) -> None:
    write_tar(tmp_path / "s.tar", members, format=form)
    shards = open_source(tmp_path)
    found = shards.read(0)
    assert [message.content for message in found.messages] == content
    assert shards.read_text(0).sizes == found.sizes
    assert found.sizes == ((8, 6),) * len(found.images)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read(tmp_path: Path, form: int) -> None:
    name = "folder/" + "long" * 40
    write_tar(
        tmp_path / "s.tar", {f"{name}.jpg": picture(), f"{name}.txt": b"Red.", "next.jpg": picture()}, format=form
    )
    shards = open_source(tmp_path)
    assert [shards.place(number)[1] for number in range(len(shards))] == [name, "next"]
    assert shards.read(0).messages[1].text == "Red."


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"x.jpg": picture()}, "neither a json nor a txt"),
        ({"x.txt": b"Red."}, "a caption needs one image and the shard holds 0"),
        ({"x.json": b"{"}, "its JSON is broken"),
        ({"x.json": b"[]"}, "its JSON is list"),
        ({"x.json": b'{"caption": "\xff"}'}, "its json is not UTF-8"),
        (
            {"x.json": json.dumps({"conversations": TURNS}).encode()},
            "more <image> placeholders than the record has images",
        ),
        (
            {"x.json": b'{"images": [], "messages": [{"role": "user", "content": [{"type": "text"}]}]}'},
            "required field `text`",
        ),
        (
            {"x.json": b'{"images": [{"w": 1, "h": 1}], "messages": [{"role": "user", "content": []}]}'},
            "names 1 images and the shard holds 0",
        ),
    ],
)
def test_a_broken_sample_is_named_and_its_neighbours_stay(
    tmp_path: Path, members: dict[str, bytes], reason: str
) -> None:
    write_tar(tmp_path / "s.tar", {**members, "y.jpg": picture(), "y.txt": b"Fine."})
    shards = open_source(tmp_path)
    with pytest.raises(SampleError, match=reason):
        shards.read(0)
    assert shards.read(1).messages[1].text == "Fine."


# ---------------------------------------------------------------------------------------- tars that are refused


def two_samples(path: Path) -> Path:
    return write_tar(path, {"k1.jpg": picture(), "k1.txt": b"one", "k2.jpg": picture(), "k2.txt": b"two"})


def blocks(path: Path) -> Iterator[int]:
    """Offsets of the headers."""
    with tarfile.open(path) as tar:
        yield from (member.offset for member in tar)


def test_a_tar_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = two_samples(tmp_path / "whole.tar").read_bytes()
    last = list(blocks(tmp_path / "whole.tar"))[-1]
    end = last + 1024  # a header and a block of text
    cut = tmp_path / "s.tar"
    for size, reason in [
        (end - 300, rf"byte {last}, member 'k2\.txt': cut off: 3 bytes are announced and 212 are there"),
        (end, rf"byte {end}, member 'k2\.txt': the end-of-archive marker after this member is missing"),
        (end + 512, rf"byte {end}, member 'k2\.txt': the end-of-archive marker after this member is not whole"),
        (last, rf"byte {last}, member 'k2\.jpg': the end-of-archive marker"),
        (last + 100, rf"byte {last}, member 'k2\.jpg': the file ends inside the header"),
    ]:
        cut.write_bytes(whole[:size])
        with pytest.raises(DataError, match=rf"s\.tar: {reason}"):
            open_source(cut)


def test_a_damaged_header_is_refused(tmp_path: Path) -> None:
    path = two_samples(tmp_path / "s.tar")
    content = bytearray(path.read_bytes())
    content[list(blocks(path))[2] + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"member 'k1\.txt': no tar header with a right checksum follows"):
        open_source(path)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["k1.jpg", "k2.jpg", "k1.txt"], r"member 'k1\.txt': the key 'k1' comes again"),
        (["k1.txt", "k1.txt"], r"member 'k1\.txt': this member comes twice"),
        (["../up.txt"], r"member '\.\./up\.txt': the path leaves the archive"),
        (["/etc/x.txt"], r"member '/etc/x\.txt': the path leaves the archive"),
    ],
)
def test_names_that_would_mix_or_escape_are_refused(tmp_path: Path, names: list[str], reason: str) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(DataError, match=reason):
        open_source(path)


@pytest.mark.parametrize(("kind", "word"), [(tarfile.SYMTYPE, "symbolic link"), (tarfile.LNKTYPE, "hard link")])
def test_links_are_refused(tmp_path: Path, kind: bytes, word: str) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        member = tarfile.TarInfo("k.jpg")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(DataError, match=rf"member 'k\.jpg': is a {word}; only plain files are read"):
        open_source(tmp_path)


def test_a_name_that_is_not_utf8_and_a_compressed_tar_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", encoding="latin-1", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("é.txt"))
    with pytest.raises(DataError, match=r"member '.*': the name is not UTF-8"):
        open_source(tmp_path / "a.tar")
    import gzip

    (tmp_path / "b.tar").write_bytes(gzip.compress(bytes(5000)))
    with pytest.raises(DataError, match="it is compressed: unpack it first"):
        open_source(tmp_path / "b.tar")


def test_an_empty_or_missing_set_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no shards \(\*\.tar\) here"):
        open_source(tmp_path)
    write_tar(tmp_path / "s.tar", {})
    with pytest.raises(DataError, match="the shards hold no samples"):
        open_source(tmp_path)


# ---------------------------------------------------------------------------------------- the index


def test_the_index_is_rebuilt_when_the_tar_is_another(tmp_path: Path) -> None:
    path = two_samples(tmp_path / "s.tar")
    before = open_source(path)
    assert (tmp_path / "s.idx.npy").is_file()
    write_tar(path, {"z9.jpg": picture(), "z9.txt": b"new"})
    os.utime(path, ns=(1, 1))
    after = open_source(path)
    assert (len(before), len(after)) == (2, 1)
    assert before.fingerprint != after.fingerprint
    assert after.read(0).messages[1].text == "new"


def test_a_shard_replaced_while_it_is_open_is_noticed(tmp_path: Path) -> None:
    path = two_samples(tmp_path / "s.tar")
    shards = open_source(path)
    write_tar(path, {"z1.jpg": picture(), "z1.txt": b"one", "z2.jpg": picture(), "z2.txt": b"two"})
    with pytest.raises(StorageError, match=r"s\.tar: changed after it was indexed"):
        shards.read(1)


def test_a_shard_that_is_not_the_one_of_the_manifest_is_refused(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, 12)
    first, second, third = shards.tars
    assert first.stat().st_size == second.stat().st_size  # tars are padded: size alone tells little
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(DataError, match=r"shard-000000\.tar: was replaced: its members are not those of the manifest"):
        open_source(shards.directory)
    first.write_bytes(kept[:-512])
    with pytest.raises(DataError, match=r"has \d+ bytes where the manifest says"):
        open_source(shards.directory)
    first.write_bytes(kept)
    third.unlink()
    with pytest.raises(DataError, match=r"shard-000002\.tar: the shard is missing"):
        open_source(shards.directory)


def test_where_the_folder_cannot_be_written_the_index_goes_to_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = two_samples(tmp_path / "s.tar")
    real = index.write_whole

    def refusing(target: Path, content: bytes) -> None:  # the tests run as root, whom no mode stops
        if target.parent == tmp_path:
            raise PermissionError(13, "Permission denied")
        real(target, content)

    monkeypatch.setattr(index, "write_whole", refusing)
    assert len(open_source(path, cache=tmp_path / "cache")) == 2
    assert not (tmp_path / "s.idx.npy").exists()
    assert len(list((tmp_path / "cache").rglob("s.idx.npy"))) == 1


def test_the_index_says_where_each_sample_lies(tmp_path: Path) -> None:
    path = two_samples(tmp_path / "s.tar")
    rows, made = index.load_index(path, cache=tmp_path)
    again, made_again = index.load_index(path, cache=tmp_path)
    starts = list(blocks(path))
    assert (made, made_again) == (True, False)
    assert rows["offset"].tolist() == [starts[0], starts[2]]
    assert rows["nbytes"].tolist() == [starts[2] - starts[0], starts[3] + 1024 - starts[2]]
    assert rows["images"].tolist() == [1, 1]
    assert rows["json"].tolist() == [0, 0]  # a text member: its headers are read
    assert np.array_equal(rows, again)
    assert isinstance(again, np.memmap)


def test_the_index_says_where_json_and_image_of_an_own_sample_lie(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, 6)
    tar = shards.tars[0]
    rows, _ = index.load_index(tar, cache=tmp_path)
    with tarfile.open(tar) as whole:
        places = {member.name: (member.offset_data, member.size) for member in whole}
    for number, row in enumerate(rows):
        start, key = int(row["offset"]), shards.place(number)[1]
        assert (start + int(row["json"]), int(row["json_bytes"])) == places[f"{key}.json"]
        image = next((place for name, place in places.items() if name.startswith(f"{key}.0.")), (start, 0))
        assert (start + int(row["image"]), int(row["image_bytes"])) == image


@pytest.mark.parametrize(
    ("name", "key", "extension"),
    [
        ("a/b.c/k.0.jpg", "a/b.c/k", "0.jpg"),
        ("./k.JPG", "./k", "jpg"),
        ("k", None, None),
        ("._k.jpg", None, None),
        ("__meta__.json", None, None),
    ],
)
def test_names_are_split_as_webdataset_splits_them(name: str, key: str | None, extension: str | None) -> None:
    assert index.split_name(name) == (None if key is None else (key, extension))
    if not name.startswith("__"):  # webdataset leaves these out elsewhere
        match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", name)  # webdataset 1.0.2, tariterators.base_plus_ext
        assert (match and (match[1], match[2].lower())) == (None if key is None else (key, extension))


def test_a_stored_message_keeps_whether_it_is_trained() -> None:
    messages = (
        Message(role="system", content=("Be brief.",)),
        *talk("What?", "Red."),
        Message(role="user", content=("And?",)),
        Message(role="assistant", content=("Blue.",), train=False),
    )
    written = stored.to_json(Conversation(id="a/1", messages=messages))
    assert stored.whole({"json": written}, (), key="1", source="a").messages == messages
