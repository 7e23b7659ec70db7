"""Does an attention keep the samples of a packed row apart on this device? Asked of each kernel that it has."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from gpu_model import Shape, build
from torch import Tensor

from mmit.batch import IGNORE, Batch, Encoded, collate
from mmit.config import Stage
from mmit.errors import ConfigError
from mmit.models.vlm import VisionLanguageModel

LAYERS = 2
REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class Isolation:
    """What was seen of one kernel.

    leak: by how much a sample's loss changed with the sample before it. gradient_leak: the largest gradient of its
    loss in the other sample's embeddings. difference: of its loss in the row and alone, relative. milliseconds: of a
    forward and backward pass of the row. refused: why it cannot run here, where it cannot.
    """

    kernel: str
    leak: float = 0.0
    gradient_leak: float = 0.0
    difference: float = 0.0
    milliseconds: float = 0.0
    refused: str = ""

    def holds(self, dtype: torch.dtype) -> bool:
        """True where nothing leaks and the loss is that of the sample alone, up to the rounding of ``dtype``."""
        allowed = 16 * torch.finfo(dtype).eps
        return not self.refused and self.leak == 0 and self.gradient_leak == 0 and self.difference <= allowed


def kernels() -> list[str]:
    """What a run file may name as ``attention``."""
    return [name for name in get_args(Stage.model_fields["attention"].annotation) if name != "auto"]


def try_kernel(shape: Shape, kernel: str, *, length: int, device: str, dtype: torch.dtype) -> Isolation:
    """Try one kernel on a row of two samples of ``length`` tokens in all, at the true widths and two layers."""
    # a head of its own: a tied one would give every row of the token table a gradient
    shape = replace(shape, text={**shape.text, "tie_word_embeddings": False})
    model = build(shape, dtype=dtype, device=device, layers=LAYERS).model
    model.train_only({"language_model": 1.0})
    try:
        model.use_attention(kernel)
    except ConfigError as error:
        return Isolation(kernel=kernel, refused=str(error))
    model.train()
    # the rows of the token table tell the samples apart: each draws its ids from a part of its own
    side = shape.pixels
    first, other, second = (_sample(length // 2 + more, ids, side) for more, ids in ((7, 100), (7, 200), (-7, 300)))
    one, changed, alone = (
        collate([row], pad_id=0, image_size=(side, side)).to(device)
        for row in ([first, second], [other, second], [second])
    )
    loss, gradient = _loss_and_gradient(model, one)
    loss_beside_other, _ = _loss_and_gradient(model, changed)
    loss_alone, _ = _loss_and_gradient(model, alone)
    return Isolation(
        kernel=kernel,
        leak=abs(loss - loss_beside_other),
        gradient_leak=float(gradient[100:200].abs().max()),
        difference=abs(loss - loss_alone) / loss_alone,
        milliseconds=_milliseconds(model, one, device),
    )


def _sample(tokens: int, first_id: int, side: int) -> Encoded:
    ids = first_id + torch.randint(0, 100, (tokens,), generator=torch.Generator().manual_seed(first_id))
    labels = torch.full_like(ids, IGNORE)
    if first_id == 300:
        labels[:-1] = ids[1:]
    none = torch.zeros((0, 3, side, side), dtype=torch.uint8)
    return Encoded(id=str(first_id), input_ids=ids, labels=labels, pixels=none)


def _loss_and_gradient(model: VisionLanguageModel, batch: Batch) -> tuple[float, Tensor]:
    table: Any = model.language_model.get_input_embeddings()
    model.zero_grad(set_to_none=True)
    loss = model(batch)
    loss.backward()
    return float(loss.detach()), table.weight.grad.float()


def _milliseconds(model: VisionLanguageModel, batch: Batch, device: str) -> float:
    times = []
    for _ in range(REPEATS):
        _synchronize(device)
        started = time.perf_counter()
        model(batch).backward()
        _synchronize(device)
        times.append(time.perf_counter() - started)
    return 1000 * sorted(times)[REPEATS // 2]


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()
