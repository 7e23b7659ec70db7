"""Lengths are measured once, in parallel, and what is too long is treated as asked."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from data_factories import make_shards, measure, picture
from msgspec import structs

from mmit.conversation import Conversation, ImageRef, Message
from mmit.data import lengths, side_files
from mmit.data.lengths import LengthTable, cut_turns, fit, measure_lengths
from mmit.data.shard_set import ShardSet, open_source
from mmit.data.shards import ShardWriter
from mmit.errors import DataError


def tabled(shards: ShardSet, **more: Any) -> LengthTable:
    settings: dict[str, Any] = {"fingerprint": "f", "max_skipped": 0.0, "processes": 1, "progress": False, **more}
    return measure_lengths(shards, measure, **settings)


def write(folder: Path, conversations: list[Conversation]) -> ShardSet:
    with ShardWriter(folder / "s.tar") as shard:
        for number, conversation in enumerate(conversations):
            shard.write(f"k{number}", conversation)
        shard.finish()
    return open_source(folder, cache=folder / "cache")


def dialogue(*turns: str, name: str = "s/0", images: int = 0) -> Conversation:
    """Turns of words, the user first; ``images`` pictures stand in the last question."""
    messages = [Message(role="user" if n % 2 == 0 else "assistant", content=(turn,)) for n, turn in enumerate(turns)]
    at = (len(turns) - 1) // 2 * 2
    messages[at] = structs.replace(messages[at], content=(*map(ImageRef, range(images)), *messages[at].content))
    return Conversation(id=name, messages=tuple(messages), images=(picture(),) * images, sizes=((8, 6),) * images)


def test_the_table_holds_what_measure_says(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, 12)
    found = tabled(shards, processes=2)
    for number in range(12):
        conversation = shards.read(number)
        row = found.rows[number].tolist()
        assert row == (*measure(conversation), 0)


def test_a_table_is_computed_once_for_each_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = make_shards(tmp_path, 6)
    first = tabled(shards)
    monkeypatch.setattr(lengths, "_compute", lambda *_, **__: pytest.fail("computed again"))
    assert tabled(shards).digest() == first.digest()
    assert len(list((shards.directory / "lengths").glob("*.npy"))) == 1
    with pytest.raises(pytest.fail.Exception):
        tabled(shards, fingerprint="other tokenizer")


def test_of_several_ranks_one_computes_and_the_others_wait(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, 6)
    context = multiprocessing.get_context("fork")
    counter = context.Value("i", 0)

    def slow(conversation: Conversation) -> tuple[int, int, int]:
        import time

        with counter.get_lock():
            counter.value += 1
        time.sleep(0.02)
        return measure(conversation)

    def rank() -> None:
        measure_lengths(shards, slow, fingerprint="f", max_skipped=0, processes=1, progress=False)

    ranks = [context.Process(target=rank) for _ in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0, 0]
    assert counter.value == 6


def test_where_the_shards_cannot_be_written_the_table_goes_to_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = make_shards(tmp_path, 3)
    real = side_files._writable
    monkeypatch.setattr(side_files, "_writable", lambda folder: shards.directory not in folder.parents and real(folder))
    tabled(shards)
    assert not (shards.directory / "lengths").exists()
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 1


def test_samples_that_cannot_be_measured_are_left_out_listed_and_limited(tmp_path: Path) -> None:
    shards = write(
        tmp_path, [dialogue("a", "b"), dialogue("a", "poison", name="s/1"), dialogue("a", "b c", name="s/2")]
    )
    with pytest.raises(DataError, match=r"1 of 3 samples cannot be used.*s\.tar: k1 \(s/1\): the text is poisoned"):
        tabled(shards)
    for _ in range(2):  # computed, then read
        found = tabled(shards, max_skipped=0.34)
        assert found.tokens.tolist() == [2, 0, 3]
        assert [(bad.id, bad.key, bad.shard) for bad in found.refused] == [("s/1", "k1", "s.tar")]


def fitted(shards: ShardSet, *, length: int, too_long: str, tiles_per_row: int = 9) -> tuple[LengthTable, int]:
    return fit(
        tabled(shards),
        shards,
        measure,
        fingerprint="f",
        length=length,
        tiles_per_row=tiles_per_row,
        too_long=too_long,
    )


LONG = [
    dialogue("a b", "c d", name="s/0"),  # 4
    dialogue("a", "b", "c d", "e f g", "h", "i j", name="s/1"),  # 2, then 7, then 10
    dialogue("a b c d", "e f g h", name="s/2"),  # 8 and nothing to leave out
]


def test_a_sample_longer_than_a_row_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    shards = write(tmp_path, LONG)
    with pytest.raises(DataError) as error:
        fitted(shards, length=7, too_long="error")
    assert "2 of 3 samples are longer than a row of 7 tokens" in str(error.value)
    assert "k1 (10 tokens, 0 tiles), k2 (8 tokens, 0 tiles)" in str(error.value)
    assert "Raise batch.length to 10" in str(error.value)
    assert fitted(shards, length=10, too_long="error")[1] == 0


def test_too_long_samples_are_dropped_or_lose_whole_turns(tmp_path: Path) -> None:
    shards = write(tmp_path, LONG)
    dropped, over = fitted(shards, length=7, too_long="drop")
    assert (dropped.tokens.tolist(), over) == ([4, 0, 0], 2)
    for _ in range(2):  # computed, then read
        cut, over = fitted(shards, length=7, too_long="drop_turns")
        assert (cut.tokens.tolist(), over) == ([4, 7, 0], 2)
        assert [cut.turns(n) for n in range(3)] == [0, 4, 0]
        assert cut.trained.tolist() == [2, 4, 0]
    assert [m.text for m in cut_turns(shards.read(1), 4).messages] == ["a", "b", "c d", "e f g"]


def test_a_sample_with_more_images_than_a_row_may_hold_is_too_long(tmp_path: Path) -> None:
    shards = write(tmp_path, [dialogue("a", "b", "c", "d", images=3)])
    cut, over = fitted(shards, length=99, too_long="drop_turns", tiles_per_row=2)
    assert (cut.tokens.tolist(), cut.tiles.tolist(), cut.turns(0), over) == ([2], [0], 2, 1)


def test_cutting_turns_keeps_each_picture_with_its_place() -> None:
    pictures = tuple(picture(8 + n, 6) for n in range(3))
    whole = Conversation(
        id="x",
        messages=(
            Message(role="user", content=(ImageRef(2), "a", ImageRef(0))),
            Message(role="assistant", content=("b",)),
            Message(role="user", content=(ImageRef(1),)),
            Message(role="assistant", content=("c",)),
        ),
        images=pictures,
        sizes=((8, 6), (9, 6), (10, 6)),
    )
    cut = cut_turns(whole, 2)
    assert cut.images == (pictures[2], pictures[0])
    assert cut.sizes == ((10, 6), (8, 6))
    assert cut.messages[0].content == (ImageRef(0), "a", ImageRef(1))
