"""Tiny models of each kind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from model_factories import tiny_model_section

from mmit.config import ComposedModel
from mmit.models.build import build_model
from mmit.models.loaded import LoadedModel

KINDS = ("clip_llama", "siglip_qwen2", "open_clip_llama")

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sections(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ComposedModel]:
    """The ``model`` section of each kind; the parts lie in a temporary directory."""
    folder = tmp_path_factory.mktemp("parts")
    return {kind: ComposedModel.model_validate(tiny_model_section(folder / kind, kind)) for kind in KINDS}


@pytest.fixture
def build(sections: dict[str, ComposedModel]) -> Callable[..., LoadedModel]:
    """A function that builds a kind afresh."""

    def make(kind: str = "clip_llama", *, seed: int = 3) -> LoadedModel:
        return build_model(sections[kind], dtype=torch.float32, seed=seed)

    return make


@pytest.fixture(params=KINDS)
def loaded(request: pytest.FixtureRequest, build: Callable[..., LoadedModel]) -> LoadedModel:
    """Each kind in turn."""
    return build(request.param)
