"""The command line: quick where it can be, and one sentence with exit code 2 for every mistake of a user."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from model_factories import tiny_model_section
from PIL import Image
from safetensors.torch import load_file, save_file

import mmit.cli
from mmit.models import build_model, save_model


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return tiny_model_section(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def model_directory(parts: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mmit.config import ComposedModel

    directory = tmp_path_factory.mktemp("model") / "model"
    loaded = build_model(ComposedModel.model_validate(parts), dtype=torch.float32, seed=0)
    save_model(loaded, None, directory, made_from={})
    return directory


def picture(path: Path) -> Path:
    Image.new("RGB", (30, 20), (200, 10, 10)).save(path)
    return path


def records(folder: Path, *, answer: str = "a red bus", image: str | None = "a.png", count: int = 3) -> Path:
    picture(folder / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat?" if image else "What?"}, {"from": "gpt", "value": answer}]
    record = {"conversations": turns} | ({"image": image} if image else {})
    path = folder / "records.json"
    path.write_text(json.dumps([{"id": str(n), **record} for n in range(count)]))
    return path


class Mistake:
    """What the command line says to a mistake, in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch = monkeypatch
        self.capsys = capsys

    def __call__(self, *words: object, code: int = 2) -> str:
        self.monkeypatch.setattr(sys, "argv", ["mmit", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            mmit.cli.main()
        error = self.capsys.readouterr().err
        assert ended.value.code == code, error
        sentences = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(sentences) == 1, error
        assert "Traceback" not in error
        return sentences[0]


@pytest.fixture
def mistake(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Mistake:
    return Mistake(monkeypatch, capsys)


def run_file(folder: Path, parts: dict, shards: Path, **stage: object) -> Path:
    section = {
        "train": {"connector": 1e-3},
        "data": {"mix": [{"shards": str(shards)}]},
        "batch": {"length": 64, "tokens_per_step": 128},
        **stage,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"name": "t", "output": str(folder), "model": parts, "stages": {"only": section}}))
    return path


def converted(folder: Path, **options: Any) -> Path:
    from mmit.data.convert import Conversion, convert

    source = records(folder, **options)
    target = folder / "shards"
    convert(Conversion(reader="llava_json", source=source, target=target, name="t"), processes=1, progress=False)
    return target


def imported(*words: str) -> set[str]:
    """The modules that a command of ``mmit`` imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mmit", *words], capture_output=True, text=True, check=True
    )
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}


@pytest.mark.parametrize("words", [("--help",), ("config", "show"), ("launch", "--slurm", "-")])
def test_help_and_config_answer_without_heavy_imports(words: tuple[str, ...], tmp_path: Path, parts: dict) -> None:
    file = () if words == ("--help",) else (str(run_file(tmp_path, parts, tmp_path)),)
    found = imported(*words, *file)
    assert "mmit.cli" in found
    assert not found & {"torch", "transformers", "deepspeed", "numpy", "PIL", "huggingface_hub"}


def test_a_missing_run_file(mistake: Mistake, tmp_path: Path) -> None:
    assert "nowhere.yaml: no such file" in mistake("train", tmp_path / "nowhere.yaml")


def test_an_unknown_key_and_a_wrong_type(mistake: Mistake, tmp_path: Path, parts: dict) -> None:
    file = run_file(tmp_path, parts, tmp_path, epoch=3)
    assert "one mistake" in mistake("train", file)
    assert "one mistake" in mistake("config", "show", run_file(tmp_path, parts, tmp_path), "seed=often")


def test_a_missing_source(mistake: Mistake, tmp_path: Path) -> None:
    assert "no.json" in mistake("data", "convert", tmp_path / "no.json", "--out", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_broken_json(mistake: Mistake, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('[{"id": "1", "conversations": [}]')
    assert "broken.json" in mistake("data", "convert", tmp_path / "broken.json", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_empty_data_set(mistake: Mistake, tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text("[]")
    assert "empty.json" in mistake("data", "convert", tmp_path / "empty.json", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_record_whose_image_is_missing(mistake: Mistake, tmp_path: Path) -> None:
    said = mistake("data", "convert", records(tmp_path, image="b.png"), "--out", tmp_path / "out")
    assert "b.png" in said
    assert not (tmp_path / "out").exists()


def test_an_image_that_is_none(mistake: Mistake, tmp_path: Path) -> None:
    source = records(tmp_path)
    (tmp_path / "a.png").write_bytes(b"this is no picture")
    assert "bad records" in mistake("data", "convert", source, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_decompression_bomb(mistake: Mistake, tmp_path: Path) -> None:
    source = records(tmp_path)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "a.png")  # 400 megapixels in some 50 kB
    assert "pixels" in mistake("data", "convert", source, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sample_longer_than_a_row(mistake: Mistake, tmp_path: Path, parts: dict) -> None:
    file = run_file(tmp_path, parts, converted(tmp_path, answer="a red bus " * 50))
    said = mistake("data", "plan", file)
    assert "longer than a row of 64 tokens" in said
    assert "too_long" in said


def test_shards_that_are_not_there(mistake: Mistake, tmp_path: Path, parts: dict) -> None:
    assert "there is no such directory or tar" in mistake(
        "data", "plan", run_file(tmp_path, parts, tmp_path / "nowhere")
    )


def test_a_tokenizer_without_the_tokens_of_the_template(mistake: Mistake, tmp_path: Path, parts: dict) -> None:
    shards = converted(tmp_path)
    said = mistake("data", "plan", run_file(tmp_path, parts, shards), "stages.only.data.template=chatml")
    assert "<|im_end|>" in said


def test_a_recipe_that_does_not_exist(mistake: Mistake, tmp_path: Path, parts: dict) -> None:
    file = run_file(tmp_path, parts, tmp_path, data={"mix": [{"recipe": "llava_pretrain_559k"}]})
    assert "did you mean 'llava_pretrain_558k'" in mistake("data", "plan", file)


def test_a_directory_without_a_model(mistake: Mistake, tmp_path: Path) -> None:
    assert str(tmp_path) in mistake("chat", tmp_path, "--prompt", "Hi")


def test_a_picture_that_is_missing_is_said_before_the_model_is_loaded(
    mistake: Mistake, tmp_path: Path, model_directory: Path
) -> None:
    assert "gone.jpg" in mistake("chat", model_directory, "--image", tmp_path / "gone.jpg", "--prompt", "Hi")


@pytest.mark.parametrize("fault", ["missing", "extra", "empty"])
def test_a_model_directory_with_a_wrong_tensor(
    mistake: Mistake, tmp_path: Path, model_directory: Path, fault: str
) -> None:
    shutil.copytree(model_directory, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    name = "multi_modal_projector.linear_1.bias"
    if fault == "missing":
        del tensors[name]
    elif fault == "extra":
        name = "multi_modal_projector.linear_3.bias"
        tensors[name] = torch.zeros(2)
    else:
        tensors[name] = torch.zeros(0)
    save_file(tensors, file, metadata={"format": "pt"})
    assert name in mistake("chat", tmp_path / "model", "--prompt", "Hi")


def test_one_shot_prints_the_answer_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, model_directory: Path
) -> None:
    words = ["chat", model_directory, "--image", picture(tmp_path / "a.png"), "--prompt", "What?"]
    monkeypatch.setattr(sys, "argv", ["mmit", *map(str, words), "--max-new-tokens", "4"])
    with pytest.raises(SystemExit) as ended:
        mmit.cli.main()
    assert ended.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_an_unknown_verb_is_refused_with_exit_code_2() -> None:
    done = subprocess.run([sys.executable, "-m", "mmit", "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "trian" in done.stderr
