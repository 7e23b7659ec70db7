"""Every command that takes a path, given a wrong one: a sentence that names it, no traceback, and nothing written."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from mmit.cli import app
from mmit.errors import MmitError

NEEDED = {
    "data show": ["--tokenizer", "nothere"],
    "data browse": ["-o", "page.html"],
    "data construct": ["-o", "out"],
    "data convert": ["-o", "out"],
    "eval": ["--data", "nothere"],
    "new": ["--model", "nothere", "--data", "nothere"],
    "merge": ["out"],
    "export": ["out"],
    "diff": ["nothere"],
    "launch": ["--slurm", "job.sh"],
}
"""What a command wants beside its path."""
WITHOUT_PATH = {"demo", "doctor", "config schema", "data recipes"}


def commands() -> Iterator[str]:
    def below(group: Any, before: str) -> Iterator[str]:
        for name, command in group.commands.items():
            words = f"{before} {name}".strip()
            yield from below(command, words) if hasattr(command, "commands") else [words]

    yield from (words for words in below(typer.main.get_command(app), "") if words not in WITHOUT_PATH)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_wrong_path_is_one_sentence_with_its_name_under_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.yaml").write_text("- 1\n- 2\n")
    Path("noise.yaml").write_bytes(bytes(range(256)))
    Path("folder").mkdir()
    there = set(os.listdir())
    wrong = []
    for words in commands():
        for path in ("", "nothere", *sorted(there)):
            given = [*words.split(), *([path, *NEEDED.get(words, [])] if path else [])]
            result = CliRunner().invoke(app, given)
            error = result.exception
            told = str(error) if isinstance(error, MmitError) else result.output
            is_sentence = isinstance(error, MmitError | SystemExit) and result.exit_code != 0
            # a run file may be wrong in what it names: then that is told
            if not is_sentence or (path and path not in told and "nothere" not in told):
                wrong.append((" ".join(given), error, told))
    assert wrong == []
    # bad records are listed beside what a conversion had so far
    assert set(os.listdir()) - there <= {"out.partial"}
