"""The store of features: what is written comes back, by its key; stale, torn and damaged folders are told."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmit.data.atomic import write_whole
from mmit.data.faults import StorageError
from mmit.data.feature_writer import FeatureWriter
from mmit.data.features import MANIFEST, FeatureKind, FeatureStore, note_covered, open_folder
from mmit.errors import DataError

KIND = FeatureKind(parts={"weights": "a1", "layer": "-2", "image size": "[28, 28]"}, patches=4, width=6)


def seen(number: int, *, tiles: int = 1) -> Tensor:
    """Made-up features in fp32, none of which is a bf16 number."""
    return torch.randn((tiles, 4, 6), generator=torch.Generator().manual_seed(number))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    open_folder(tmp_path / "features", KIND, create=True)
    return tmp_path / "features"


def test_features_come_back_rounded_to_bf16_all_tiles_of_an_image_together(folder: Path) -> None:
    with FeatureWriter(folder) as writer:
        for number in range(5):
            writer.add(KIND.key(bytes([number])), seen(number, tiles=1 + number))
    store = pickle.loads(pickle.dumps(FeatureStore(folder, KIND)))  # as it goes to a worker process
    assert len(store) == 5
    for number in range(5):
        found = store.read(bytes([number]))
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, seen(number, tiles=1 + number).to(torch.bfloat16))


def test_an_image_takes_two_bytes_a_value_and_36_of_index(folder: Path) -> None:
    with FeatureWriter(folder) as writer:
        writer.add(KIND.key(b"a"), seen(0, tiles=3))
    assert (folder / "000000.features").stat().st_size == 3 * 4 * 6 * 2 == 3 * KIND.tile_bytes
    assert (folder / "000000.index").stat().st_size == 36


def test_the_key_changes_with_the_image_the_look_and_every_part(folder: Path) -> None:
    keys = {KIND.key(b"a"), KIND.key(b"b"), KIND.key(b"a", look="whole")}
    for name in KIND.parts:
        keys.add(replace(KIND, parts={**KIND.parts, name: "other"}).key(b"a"))
    assert len(keys) == 3 + len(KIND.parts)


def test_a_stale_folder_is_refused_by_what_changed(folder: Path) -> None:
    changed = replace(KIND, parts={**KIND.parts, "layer": "-3", "image tiling": "anyres"})
    with pytest.raises(DataError, match=r"layer was -2 and is -3; image tiling was not set and is anyres\. Set this"):
        FeatureStore(folder, changed)
    with pytest.raises(DataError, match="weights was a1 and is b2"):
        open_folder(folder, replace(KIND, parts={**KIND.parts, "weights": "b2"}), create=True)


def test_a_folder_without_features_is_told_and_a_foreign_one_is_not_taken(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no features .* `mmit data cache` makes them"):
        FeatureStore(tmp_path / "none", KIND)
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(DataError, match="is not empty"):
        open_folder(tmp_path, KIND, create=True)
    write_whole(tmp_path / MANIFEST, b"{}")
    with pytest.raises(DataError, match="unreadable"):
        FeatureStore(tmp_path, KIND)


def test_an_image_that_is_not_there_is_an_error_with_the_remedy(folder: Path) -> None:
    with pytest.raises(StorageError, match=r"run `mmit data cache` again, or set data.missing_features: compute"):
        FeatureStore(folder, KIND).read(b"never seen")


def test_why_the_encoder_cannot_see_an_image_is_kept(folder: Path) -> None:
    with FeatureWriter(folder) as writer:
        writer.refuse(KIND.key(b"broken"), "the image is damaged: cut short")
    with pytest.raises(DataError, match=r"^the image is damaged: cut short$") as caught:
        FeatureStore(folder, KIND).read(b"broken")
    assert not isinstance(caught.value, StorageError)  # the record is a hole in its row; the run goes on


def test_writers_at_work_at_once_have_files_of_their_own_and_see_each_other(folder: Path) -> None:
    with FeatureWriter(folder) as one, FeatureWriter(folder) as two:
        one.add(KIND.key(b"a"), seen(1))
        two.add(KIND.key(b"b"), seen(2))
        assert KIND.key(b"a") not in two
        two.look_around()
        assert KIND.key(b"a") in two
        two.add(KIND.key(b"a"), seen(3))  # known: nothing is written
    assert sorted(path.name for path in folder.glob("*.features")) == ["000000.features", "000001.features"]
    store = FeatureStore(folder, KIND)
    assert len(store) == 2
    assert torch.equal(store.read(b"a"), seen(1).to(torch.bfloat16))


def test_files_stay_below_their_size_and_one_image(folder: Path) -> None:
    with FeatureWriter(folder, file_bytes=2 * KIND.tile_bytes) as writer:
        for number in range(5):
            writer.add(KIND.key(bytes([number])), seen(number))
    sizes = [path.stat().st_size // KIND.tile_bytes for path in sorted(folder.glob("*.features"))]
    assert sizes == [2, 2, 1]
    assert all(torch.equal(FeatureStore(folder, KIND).read(bytes([n])), seen(n).bfloat16()) for n in range(5))


def test_a_torn_index_and_cut_features_are_images_that_are_not_there(folder: Path) -> None:
    with FeatureWriter(folder) as writer:
        for number in range(3):
            writer.add(KIND.key(bytes([number])), seen(number))
    os.truncate(folder / "000000.index", 36 * 2 + 35)
    assert len(FeatureStore(folder, KIND)) == 2
    os.truncate(folder / "000000.features", KIND.tile_bytes * 2 - 1)
    store = FeatureStore(folder, KIND)
    assert len(store) == 1
    assert torch.equal(store.read(bytes([0])), seen(0).bfloat16())


def test_a_changed_byte_is_found(folder: Path) -> None:
    with FeatureWriter(folder) as writer:
        writer.add(KIND.key(b"a"), seen(0))
    content = bytearray((folder / "000000.features").read_bytes())
    content[7] ^= 1
    (folder / "000000.features").write_bytes(content)
    with pytest.raises(StorageError, match=r"000000\.features: damaged; remove it and run `mmit data cache` again"):
        FeatureStore(folder, KIND).read(b"a")


def test_a_writer_killed_at_any_moment_leaves_whole_images_only(folder: Path) -> None:
    code = f"""
import sys, torch
from pathlib import Path
from mmit.data.feature_writer import FeatureWriter
from mmit.data.features import FeatureKind
kind = FeatureKind(parts={dict(KIND.parts)!r}, patches=4, width=6)
with FeatureWriter(Path({str(folder)!r})) as writer:
    for number in range(10**6):
        made = torch.randn((1, 4, 6), generator=torch.Generator().manual_seed(number))
        writer.add(kind.key(str(number).encode()), made)
        if number == 200:
            print("go", flush=True)
"""
    killed = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert killed.stdout is not None
    killed.stdout.readline()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    store = FeatureStore(folder, KIND)
    assert len(store) > 200
    for number in range(len(store)):
        assert torch.equal(store.read(str(number).encode()), seen(number).bfloat16())


def test_a_set_of_images_is_covered_once_it_was_gone_through(folder: Path) -> None:
    with FeatureWriter(folder) as writer:
        writer.add(KIND.key(b"a"), seen(0))
    store = FeatureStore(folder, KIND)
    assert not store.covers("abc")
    note_covered(store, "abc", what="stage align")
    assert store.covers("abc")
    (folder / "000000.index").unlink()
    assert not FeatureStore(folder, KIND).covers("abc")  # features went since
