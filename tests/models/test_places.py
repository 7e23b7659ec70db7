"""Models that are named as on the hub: a copy in the hub's cache is opened, with no network at hand."""

import shutil
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download
from model_factories import tiny_llm_dir

from mmit.errors import CheckpointError
from mmit.models import find_model_directory
from mmit.models.formats import places

NAME = "llava-hf/llava-1.5-7b-hf"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    offline = partial(snapshot_download, cache_dir=tmp_path / "cache", local_files_only=True)
    monkeypatch.setattr(places, "snapshot_download", offline)
    return tmp_path / "cache"


def test_a_whole_model_is_found_by_its_name_on_the_hub(cache: Path, tmp_path: Path) -> None:
    kept = cache / "models--llava-hf--llava-1.5-7b-hf"
    shutil.copytree(tiny_llm_dir(tmp_path / "model"), kept / "snapshots" / "0123456789")
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("0123456789")
    assert find_model_directory(NAME) == kept / "snapshots" / "0123456789"


def test_a_name_that_is_nowhere_is_one_sentence(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"no model directory {NAME}, and the hub does not give"):
        find_model_directory(NAME)
    (tmp_path / "runs").mkdir()
    for path in ("runs/misspelt", "misspelt", "./no/model", "a/b/c", str(tmp_path / "nothing")):
        with pytest.raises(CheckpointError, match=f"there is no model directory {path}$"):
            find_model_directory(path)
