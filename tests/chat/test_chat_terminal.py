"""The terminal: one shot for scripts, and a conversation through real pipes."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from chat_pictures import picture

from mmit.chat import Chat
from mmit.chat.terminal import HELP, Style, run_chat
from mmit.errors import DataError

START = """
import sys, torch
from mmit.chat.terminal import Style, run_chat
torch.set_num_threads(1)
run_chat(sys.argv[1], style=Style(max_new_tokens=int(sys.argv[2])), device="cpu")
"""


def test_one_shot_prints_the_answer_and_nothing_else(
    llama_stage: Path, llama: Chat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "red.png").write_bytes(picture("red"))
    style = Style(max_new_tokens=9)
    run_chat(llama_stage, [tmp_path / "red.png"], "What colour is the circle?", style=style, device="cpu")
    expected = llama.ask("What colour is the circle?", [picture("red")], max_new_tokens=9)
    assert capsys.readouterr().out == expected + "\n"


def test_a_dash_reads_the_prompt_from_standard_input(
    llama_stage: Path, llama: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("How many?\n"))
    run_chat(llama_stage, prompt="-", style=Style(max_new_tokens=9), device="cpu")
    assert capsys.readouterr().out == llama.ask("How many?", max_new_tokens=9) + "\n"


def test_a_missing_picture_is_found_before_the_model_is_opened(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.png cannot be read"):
        run_chat(tmp_path / "no model", [tmp_path / "nowhere.png"], "What?", style=Style(), device="cpu")


def test_a_conversation_through_pipes(llama_stage: Path, llama: Chat, tmp_path: Path) -> None:
    (tmp_path / "a red one.png").write_bytes(picture("red"))
    with subprocess.Popen(
        [sys.executable, "-c", START, str(llama_stage), "300"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        bufsize=0,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"Describe the image.\n")
        process.stdin.flush()
        begun = process.stdout.read(1)  # the answer streams: its first byte is here long before its last
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(
            b"/reset\n/image a red one.png\n/image nowhere.png\n/help\n/nonsense\n\n/quit\nunread\n", timeout=60
        )
    said, _, rest = (begun + out).decode().partition("\nforgotten\n")
    whole = llama.ask("Describe the image.", max_new_tokens=300)
    assert whole.startswith(said)
    assert len(said) < len(whole)  # Ctrl-C stopped it
    assert rest == f"1 picture for the next question\n{HELP}\n"
    assert err.decode().splitlines()[-3:] == [
        "(stopped)",
        "error: image nowhere.png cannot be read: No such file or directory",
        "error: there is no command /nonsense; /help lists them",
    ]
    assert process.returncode == 0


def test_history_and_pictures_reach_the_next_question(
    llama_stage: Path, llama: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "red.png").write_bytes(picture("red"))
    lines = f"/image {tmp_path / 'red.png'}\nWhat is in the picture?\nHow many?\n/reset\nHow many?\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    run_chat(llama_stage, style=Style(max_new_tokens=7), device="cpu")
    expected = [
        "1 picture for the next question",
        llama.ask("What is in the picture?", [picture("red")], max_new_tokens=7),
        llama.ask("How many?", max_new_tokens=7),
        "forgotten",
        Chat(llama.loaded).ask("How many?", max_new_tokens=7),
    ]
    assert expected[2] != expected[4]  # the history is seen
    assert capsys.readouterr().out == "\n".join(expected) + "\n"
