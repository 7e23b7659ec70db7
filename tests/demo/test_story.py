"""The whole story at test size, through the product's own ways, and then README's commands on what it left."""

import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import mmit.cli
from mmit.config import load_config
from mmit.demo.page import Results
from mmit.demo.story import run_demo

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.slow


def commands() -> list[str]:
    """The lines of README's blocks that call mmit from the virtual environment."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines() if line.startswith(".venv/bin/mmit ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("story")


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    return run_demo(folder / "demo_run", size="test")


def test_two_stages_teach_the_model_to_look(results: Results) -> None:
    tuned = results.accuracy["after align and instruct"]
    blind = results.accuracy["after align and instruct, a blank picture"]
    assert tuned["colour"] > 0.8
    assert blind["colour"] <= 0.45


def test_the_language_model_is_not_the_limit(results: Results) -> None:
    assert results.accuracy["language model told the scene in words (the ceiling)"]["overall"] > 0.9


def test_a_picture_and_a_page_without_outside_parts_are_left(results: Results, folder: Path) -> None:
    assert results.shown
    page = (folder / "demo_run" / "demo.html").read_text()
    assert "after align and instruct" in page
    assert not re.findall(r"(?:src|href)=[\"']https?:", page)
    assert (folder / "demo_run" / "scenes.png").stat().st_size > 1000


def test_readme_has_commands() -> None:
    assert len(commands()) >= 8


@pytest.mark.parametrize("line", [line for line in commands() if " serve " not in line])
def test_readmes_commands_work_as_they_stand(
    results: Results, folder: Path, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert results
    monkeypatch.chdir(folder)
    if " train " in line:
        words = [sys.executable, "-m", "mmit", *shlex.split(line)[1:]]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))  # a conversation ends at once
    with pytest.raises(SystemExit) as ended:
        mmit.cli.main()
    assert ended.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_the_run_files_that_are_shipped_are_right(path: Path) -> None:
    assert load_config(path).stages


def test_every_file_that_readme_names_is_there() -> None:
    named = re.findall(r"(?:\]\(|\s)((?:docs|configs)/[\w./-]+\.\w+|[A-Z]+\.md)", README)
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).exists()] == []
