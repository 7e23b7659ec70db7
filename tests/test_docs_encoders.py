"""The encoder of one's own in docs/encoders.md, run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from model_factories import tiny_llm_dir
from models_support import batch_of, sample
from torchvision.models import mobilenet_v3_small

from mmit.config import ComposedModel
from mmit.models import build_model, load_model, save_model

PAGE = (Path(__file__).parent.parent / "docs" / "encoders.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_an_encoder_of_ones_own_takes_less_than_thirty_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("python")
    assert code.count("\n") < 30
    (tmp_path / "my_encoders.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    network = mobilenet_v3_small().features
    torch.save(network.state_dict(), "mobilenet.pt")
    section = yaml.safe_load(blocks("yaml")[-1])
    section["encoder"]["args"]["size"] = 64
    language_model = {"path": str(tiny_llm_dir(tmp_path / "llm")), "template": "vicuna"}
    loaded = build_model(
        ComposedModel.model_validate(section | {"language_model": language_model}), dtype=torch.float32, seed=0
    )
    assert loaded.spec.tokens_per_tile == 4
    batch = batch_of(loaded, [[sample(loaded, text=range(40, 50), images=1, trained=3)]])
    pixels = torch.randn((1, 3, 64, 64))
    with torch.no_grad():
        expected = network.eval()(pixels).flatten(2).transpose(1, 2)
        assert torch.equal(loaded.model.vision_tower(pixels), expected)
        logits = loaded.model.logits(batch)
    save_model(loaded, None, tmp_path / "model", made_from={})
    Path("mobilenet.pt").unlink()  # a model directory is complete
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "model", dtype=torch.float32).model.logits(batch), logits)


def test_the_sections_on_the_page_are_valid() -> None:
    for block in blocks("yaml"):
        section = yaml.safe_load(block)
        ComposedModel.model_validate(section | {"language_model": {"path": "x"}})
