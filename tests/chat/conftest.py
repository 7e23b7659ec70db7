"""Two tiny models, written once a session as a stage's folder, and opened as a user would."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from model_factories import tiny_model_section

from mmit.chat import Chat
from mmit.config import ComposedModel
from mmit.models.build import build_model
from mmit.models.save import save_model


def _stage(directory: Path, kind: Literal["clip_llama", "siglip_qwen2"]) -> Path:
    section = tiny_model_section(directory / "parts", kind)
    loaded = build_model(ComposedModel.model_validate(section), dtype=torch.float32, seed=0)
    save_model(loaded, None, directory / "stage" / "model", made_from={})
    return directory / "stage"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama_stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage's folder with CLIP + Llama and the template vicuna."""
    return _stage(tmp_path_factory.mktemp("llama"), "clip_llama")


@pytest.fixture(scope="session")
def qwen_stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage's folder with SigLIP + Qwen2 and the template chatml."""
    return _stage(tmp_path_factory.mktemp("qwen"), "siglip_qwen2")


@pytest.fixture(scope="session")
def opened(llama_stage: Path, qwen_stage: Path) -> dict[str, Chat]:
    return {"llama": Chat.load(llama_stage, device="cpu"), "qwen": Chat.load(qwen_stage, device="cpu")}


@pytest.fixture(params=["llama", "qwen"])
def chat(request: pytest.FixtureRequest, opened: dict[str, Chat]) -> Chat:
    """A fresh conversation with each model."""
    return Chat(opened[request.param].loaded)


@pytest.fixture
def llama(opened: dict[str, Chat]) -> Chat:
    """A fresh conversation with the Llama model."""
    return Chat(opened["llama"].loaded)
