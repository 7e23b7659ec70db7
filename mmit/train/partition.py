"""Parameters under ZeRO-3: partitioned over the ranks as soon as they exist, so that no rank ever holds the model."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from mmit.distributed import rank


@dataclass(frozen=True)
class _ZeroThree:
    """What transformers asks of a DeepSpeed configuration."""

    config: dict[str, Any]

    def is_zero3(self) -> bool:
        return True


class Partitioned:
    """The placement of ZeRO-3 (``mmit.models.placement``): each rank keeps its piece of every parameter.

    config: DeepSpeed's dictionary of the stage. Weights are read by rank 0 and handed out tensor by tensor.
    """

    holds = True

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self.writes = rank() == 0

    @contextmanager
    def born(self) -> Generator[None]:
        """transformers makes its models inside ``deepspeed.zero.Init`` and fills them module by module."""
        asked = _ZeroThree(self._config)
        set_hf_deepspeed_config(asked)  # transformers keeps a weak reference
        try:
            yield
        finally:
            unset_hf_deepspeed_config()

    def place(self, module: nn.Module) -> None:
        """Keep this rank's piece of each parameter; all ranks take the values of rank 0."""
        deepspeed.zero.Init(module=module, config_dict_or_path=self._config)

    def whole(self, parameters: Sequence[Tensor], *, write: bool = False) -> AbstractContextManager[object]:
        """Gather the parameters on every rank; with ``write``, rank 0's values are taken afterwards."""
        return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if write else None)

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """The shape of the whole parameter, which is empty between uses."""
        return tuple(getattr(tensor, "ds_shape", tensor.shape))

    def told(self, message: str) -> str:
        """What rank 0 says."""
        box = [message]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]
