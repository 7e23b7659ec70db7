"""Samples and batches for tiny models, and what tests of models ask again and again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmit.batch import IGNORE, Batch, Encoded, collate
from mmit.models import LoadedModel


def sample(loaded: LoadedModel, *, text: Sequence[int], images: int, trained: int, seed: int = 0) -> Encoded:
    """``images`` random pictures, then ``text``, the last ``trained`` tokens of which are trained."""
    model = loaded.model
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([loaded.image_id] * (images * model.spec.tokens_per_tile) + list(text))
    labels = torch.full_like(ids, IGNORE)
    if trained:
        labels[-trained - 1 : -1] = ids[-trained:]
    pixels = torch.randint(0, 256, (images, 3, *model.spec.canvas), generator=generator, dtype=torch.uint8)
    return Encoded(id=f"s{seed}", input_ids=ids, labels=labels, pixels=pixels)


def batch_of(loaded: LoadedModel, rows: list[list[Encoded]]) -> Batch:
    """The rows as the loader would hand them over."""
    return collate(rows, pad_id=loaded.pad_id, image_size=loaded.model.spec.canvas)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """The gradient of each parameter that has one; they are cleared."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def files_of(directory: Path) -> set[str]:
    """Names of the files in a directory."""
    return {file.name for file in directory.iterdir()}
