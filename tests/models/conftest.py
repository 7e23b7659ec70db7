"""Tiny models of each kind, built once, and batches for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from model_factories import tiny_model_section
from torch import Tensor

from mmit.batch import IGNORE, Batch, Encoded, collate
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


def sample(loaded: LoadedModel, *, text: Sequence[int], images: int, trained: int, seed: int = 0) -> Encoded:
    """``images`` random pictures, then ``text``, the last ``trained`` tokens of which are trained."""
    model = loaded.model
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([loaded.image_id] * (images * model.spec.tokens_per_tile) + list(text))
    labels = torch.full_like(ids, IGNORE)
    if trained:
        labels[-trained - 1 : -1] = ids[-trained:]
    pixels = torch.randint(0, 256, (images, 3, *model.spec.size), generator=generator, dtype=torch.uint8)
    return Encoded(id=f"s{seed}", input_ids=ids, labels=labels, pixels=pixels)


def batch_of(loaded: LoadedModel, rows: list[list[Encoded]]) -> Batch:
    """The rows as the loader would hand them over."""
    return collate(rows, pad_id=loaded.pad_id, image_size=loaded.model.spec.size)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """The gradient of each parameter that has one; they are cleared."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def files_of(directory: Path) -> set[str]:
    """Names of the files in a directory."""
    return {file.name for file in directory.iterdir()}
