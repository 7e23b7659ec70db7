"""docs/finetune.md as written: its six commands, one after the other, in a folder with the photos that it speaks of."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from finetune_factories import ASKED, MODEL, make_model, make_photos
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration
from typer.testing import CliRunner

from mmit.chat import Chat
from mmit.cli import app
from mmit.cli_data import app as data_app

DOCS = Path(__file__).parent.parent / "docs" / "finetune.md"
TEXT = DOCS.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.M | re.S)
COMMANDS = [line for kind, block in BLOCKS if not kind for line in block.splitlines() if line.startswith("mmit ")]

pytestmark = [pytest.mark.slow, pytest.mark.long]


def process(folder: Path, command: str) -> str:
    """A command in a process of its own; what it said on both streams."""
    words = [sys.executable, "-m", *shlex.split(command)]
    # passive: threads that wait for each other give the core back, which matters where tests share few
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def here(command: str) -> str:
    """A command in this process and folder, without the seconds that its imports take."""
    _, *words = shlex.split(command)
    done = CliRunner().invoke(data_app if words[0] == "data" else app, words[words[0] == "data" :])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the reader sits: the photos, the table, and the model in place of the hub's."""
    made = tmp_path_factory.mktemp("photos")
    make_photos(made, count=12)
    make_model(made)
    return made


@pytest.fixture(scope="module")
def said(folder: Path) -> list[str]:
    """What each command said."""
    assert [command.split()[1] for command in COMMANDS] == ["data", "data", "new", "train", "chat", "export"]
    convert, check, new, train, chat, export = COMMANDS
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        first = [here(convert), here(check), here(new)]
        trained = process(folder, train)
        return [*first, trained, process(folder, chat), here(export)]


def test_the_run_file_fits_the_data_and_the_loss_falls(folder: Path, said: list[str]) -> None:
    assert "12 samples, 12 images" in said[0]
    assert "no faults" in said[1]
    assert "10 samples in 10 epochs" in said[2]
    assert "held out: 2 samples" in said[2]
    lines = (folder / "runs" / "finetune" / "tune" / "evaluation.jsonl").read_text().splitlines()
    measured = [json.loads(line) for line in lines]
    assert measured[0]["step"] == 0
    assert 9 <= len(measured) <= 13
    assert measured[-1]["loss"] < 0.5 * measured[0]["loss"]
    assert all(line["text_loss"] > 0 for line in measured)
    assert re.search(r"held-out loss \d.*training \d.*text-only loss \d.* -> \d", said[3])


def test_the_answer_is_the_one_of_the_table(folder: Path, said: list[str]) -> None:
    question = shlex.split(COMMANDS[4])[-1]
    assert said[4].strip().splitlines()[-1] == ASKED[question]
    untouched = Chat.load(folder / MODEL, device="cpu")
    assert untouched.ask(question, images=[folder / "photos" / "001.jpg"], max_new_tokens=8) != ASKED[question]


def test_what_is_exported_opens_with_transformers_and_has_the_logits_of_the_adapted_model(
    folder: Path, said: list[str]
) -> None:
    assert "opened again by LlavaForConditionalGeneration" in said[5]
    directory = folder / "finetuned"
    exported = LlavaForConditionalGeneration.from_pretrained(directory).eval()
    processor = AutoProcessor.from_pretrained(directory)
    asked = processor(text="USER: <image>\nWhat? ASSISTANT:", images=[torch.zeros(3, 28, 28)], return_tensors="pt")
    adapted = folder / "runs" / "finetune" / "tune" / "model"
    # the adapter by hand: W + alpha / rank * B A, in a model of transformers
    settings = json.loads((adapted / "adapter_config.json").read_text())
    plain = LlavaForConditionalGeneration.from_pretrained(adapted / "base").eval()
    adapter = load_file(adapted / "adapter_model.safetensors")
    by_name = dict(plain.named_parameters())
    for name, down in adapter.items():
        if name.endswith("lora_A.weight"):
            up = adapter[name.replace("lora_A", "lora_B")]
            weight = next(w for n, w in by_name.items() if "language_model" in n and n.endswith(_within(name)))
            weight.data += settings["lora_alpha"] / settings["r"] * (up @ down)
    with torch.no_grad():
        # fp32; the sum of weight and adapter is rounded once on either side
        torch.testing.assert_close(exported(**asked).logits, plain(**asked).logits, rtol=0, atol=1e-4)


def _within(name: str) -> str:
    """``layers.0.self_attn.q_proj.weight`` of an adapter's name."""
    found = re.search(r"layers\.\d+\..*(?=\.lora_A)", name)
    assert found
    return f"{found[0]}.weight"


def test_the_table_of_numbers_is_what_new_chooses() -> None:
    """Samples of 640 tokens with a longest of 1,000, as the page says."""
    from mmit.train.defaults import Lengths, choose, held_out

    rows = {cells[1].strip(): cells[2:6] for line in TEXT.splitlines() if len(cells := line.split("|")) == 8}
    for column, samples in enumerate((100, 1_000, 10_000, 100_000)):
        told = {name: cells[column].strip().replace(",", "") for name, cells in rows.items() if name}
        found = choose(samples - held_out(samples), Lengths(mean=640.0, longest=1000, context=4096))
        assert told["samples"] == str(samples)
        assert told["held out"] == str(held_out(samples))
        assert (told["epochs"], told["LoRA rank"]) == (str(found.epochs), str(found.rank))
        assert told["warm-up"] == f"{found.warmup_fraction:.0%}".replace("%", " %")
        assert int(told["samples in a step"]) == found.rows_per_step * int(found.length / 640)
        assert abs(int(told["steps"]) - found.steps) < 10
