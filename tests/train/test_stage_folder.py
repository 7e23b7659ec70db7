"""The folder of a stage is held by one process, and a stage that is refused leaves nothing."""

from pathlib import Path

import pytest

from mmit.data import locks
from mmit.errors import ConfigError
from mmit.train.stage_folder import BEGUN, open_folder


def test_a_stage_that_is_refused_leaves_nothing_of_what_was_made_for_it(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    held = open_folder(tmp_path / "mine" / "runs" / "a" / "align", fresh=False)
    (held.folder / "vision_tower.safetensors").write_bytes(b"put aside before the refusal")
    held.close()
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


def test_a_stage_that_has_begun_stays_and_so_does_what_another_has_left_there(tmp_path: Path) -> None:
    begun = open_folder(tmp_path / "run" / "align", fresh=False)
    (begun.folder / BEGUN).touch()
    refused = open_folder(tmp_path / "run" / "instruct", fresh=False)
    refused.close()
    begun.close()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["align", BEGUN, "run"]
    (begun.folder / BEGUN).rename(begun.folder / "notes.txt")
    open_folder(begun.folder, fresh=False).close()
    assert (begun.folder / "notes.txt").is_file()
    with pytest.raises(ConfigError, match="no run of mmit has written"):
        open_folder(begun.folder, fresh=True)


def test_the_folder_is_free_again_when_it_is_closed_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "PATIENCE_SECONDS", 0.2)
    held = open_folder(tmp_path / "align", fresh=False)
    with pytest.raises(ConfigError, match="is being trained by another process"):
        open_folder(tmp_path / "align", fresh=False)
    held.close()
    open_folder(tmp_path / "align", fresh=False).close()
