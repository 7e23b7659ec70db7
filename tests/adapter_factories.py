"""Models with adapters whose values are as after a training, and what tests of them compare."""

from __future__ import annotations

import torch
from models_support import batch_of, sample
from torch import Tensor

from mmit.batch import Batch
from mmit.config import Lora
from mmit.models import LoadedModel, begin_adapter

LLM = Lora(rank=4, alpha=6)
ALL_PARTS = Lora(rank=4, alpha=6, targets=("language_model", "connector", "vision_tower"))


def adapted(loaded: LoadedModel, lora: Lora) -> LoadedModel:
    """The model with an adapter, which changes what it computes."""
    begin_adapter(loaded.model, lora, None, seed=5)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in loaded.model.named_parameters():
        if ".lora_" in name:
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter * (1 + noise) if "magnitude" in name else parameter + noise
    return loaded


def two_packed_samples(loaded: LoadedModel) -> Batch:
    """One row of two samples, the first with two pictures."""
    first = sample(loaded, text=range(40, 50), images=2, trained=3)
    return batch_of(loaded, [[first, sample(loaded, text=range(20, 27), images=0, trained=4)]])


def logits(loaded: LoadedModel) -> Tensor:
    with torch.no_grad():
        return loaded.model.logits(two_packed_samples(loaded))
