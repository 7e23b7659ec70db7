"""DeepSpeed's part: its engine, and the few questions that only it can answer."""

from __future__ import annotations

import logging
import math
import resource
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from mmit.distributed import local_rank, world_size
from mmit.errors import ConfigError
from mmit.train.loss_scale import LossScale


def device() -> torch.device:
    """The device of this rank."""
    return torch.device(get_accelerator().current_device_name())


def peak_memory() -> int:
    """The most bytes that this process has held so far: on its device, or in all where it has none."""
    if get_accelerator().device_name() == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    return int(get_accelerator().max_memory_allocated())


def take_device() -> None:
    """Make the accelerator of this rank the current one."""
    if get_accelerator().device_name() == "cuda":
        get_accelerator().set_device(local_rank())


def init_process_group() -> None:
    """Join the other ranks: NCCL between GPUs, gloo between CPU ranks."""
    # Only inference uses this op; building it takes a compiler and most of a minute on a machine without a GPU.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _load_muon()
    if get_accelerator().device_name() == "cuda":
        take_device()
        deepspeed.init_distributed(dist_backend="nccl", verbose=False)
    else:
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def _load_muon() -> None:
    """Load what DeepSpeed's engine imports for an optimizer that is not used here, without torch's compiler.

    Its three functions are decorated with ``torch.compile``, which at once loads the whole compiler: more than a second
    of each rank's start.
    """
    with suppress(ImportError):  # a DeepSpeed that has no such module loads nothing for it either
        names = vars(import_module("deepspeed.runtime.compiler"))
        decorator, names["compile"] = names["compile"], lambda: lambda function: function
        try:
            import_module("deepspeed.runtime.zero.muon.muon_optimizer")
        finally:
            names["compile"] = decorator


def resolve_precision(asked: str) -> torch.dtype:
    """The dtype of the weights: ``auto`` is bf16 on an accelerator, fp32 on CPU, where bf16 has no fast path.

    Raises ConfigError where the device does not compute fp16.
    """
    if asked == "auto":
        asked = "fp32" if get_accelerator().device_name() == "cpu" else "bf16"
    if asked == "fp16" and not get_accelerator().is_fp16_supported():
        where = "this CPU (it lacks AVX512-FP16)" if get_accelerator().device_name() == "cpu" else "this device"
        raise ConfigError(f"precision: DeepSpeed does not train in fp16 on {where}; set it to bf16 or fp32")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[asked]


class Engine:
    """A DeepSpeed engine with the exact loss: gradients of the mean over all trained tokens of a step.

    The sum over micro-batches and ranks of ``sum of -log p`` is divided once, by the number of trained tokens of the
    whole step; DeepSpeed's own averages over ranks and accumulation are undone.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: dict[str, Any],
        *,
        dtype: torch.dtype,
    ) -> None:
        self._clip_here = config["zero_optimization"]["stage"] == 0 and dtype == torch.float32
        self._clip_norm = config["gradient_clipping"]
        if self._clip_here:
            # plain fp32 without ZeRO: DeepSpeed clips but does not tell the norm, so torch does both
            config = {**config, "gradient_clipping": 0.0}
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        assert self.deepspeed.optimizer is not None, "DeepSpeed wraps the optimizer it was given"
        # one rank has nothing to reduce: DeepSpeed would copy every gradient twice
        self.deepspeed.enable_backward_allreduce &= not (self._clip_here and world_size() == 1)
        self.deepspeed.train()  # models are built in evaluation mode, without dropout and recomputation
        self.optimizer = self.deepspeed.optimizer
        self.zero_stage: int = config["zero_optimization"]["stage"]
        self.loss_scale = LossScale(self.optimizer) if dtype == torch.float16 else None

    @property
    def module(self) -> nn.Module:
        """The model inside."""
        return self.deepspeed.module

    def micro_step(self, batch: Any, *, trained_tokens: int) -> Tensor:  # noqa: ANN401  (whatever the model takes)
        """Forward and backward of one micro-batch; gives its detached sum of -log p.

        trained_tokens: labels of the whole optimizer step over all ranks.
        """
        loss_sum = self.deepspeed(batch)
        self.deepspeed.backward(loss_sum * (world_size() / trained_tokens), scale_wrt_gas=False)
        return loss_sum.detach()

    def forward(self, batch: Any) -> Tensor:  # noqa: ANN401  (whatever the model takes)
        """The sum of -log p of one micro-batch, with nothing done to the weights."""
        return self.deepspeed(batch)

    def close_micro_step(self, *, factor: float, update: bool = True) -> float | None:
        """Count a micro-batch as done; at the end of a step update the weights and give the gradient norm.

        factor: share of each group's peak learning rate. update: False drops the gradients of the step and leaves every
        bit of the weights and of the optimizer's state as it was; the same on every rank. A step whose gradients
        overflowed in fp16 is left out too, and its norm is infinite. Raises TrainingError where the loss scale cannot
        fall any more.
        """
        at_boundary = self.deepspeed.is_gradient_accumulation_boundary()
        norm = None
        if at_boundary:
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            if self._clip_here:
                limit = self._clip_norm or float("inf")
                trained = [p for p in self.module.parameters() if p.requires_grad]
                norm = float(torch.nn.utils.clip_grad_norm_(trained, limit))
        before = 0.0 if self.loss_scale is None else self.loss_scale.scale
        with nullcontext() if update else self._without_update():
            self.deepspeed.step()
        if at_boundary and self.loss_scale is not None and not self.deepspeed.was_step_applied():
            self.loss_scale.note(before=before)
            return math.inf
        if at_boundary and norm is None:
            norm = float(self.deepspeed.get_global_grad_norm() or 0.0)
        return norm

    @contextmanager
    def _without_update(self) -> Generator[None]:
        """DeepSpeed goes through its step, and the optimizers inside do nothing in it.

        Reducing, clipping and clearing of gradients stay with DeepSpeed under every stage; the weights that it makes
        out of the master weights are those of before.
        """
        outer: Any = self.optimizer
        inside = [getattr(outer, name, None) for name in ("optimizer", "backup_optimizer")]
        still: list[Any] = [one for one in inside if isinstance(one, torch.optim.Optimizer)] or [outer]
        for one in still:
            one.step = lambda: None
        try:
            yield
        finally:
            for one in still:
                del one.step

    def outline(self) -> dict[str, Tensor]:
        """Shape and dtype of every weight by its name, without storage; whole shapes under ZeRO-3 too."""
        stored = self.module.state_dict(keep_vars=True)
        return {
            name: torch.empty(getattr(tensor, "ds_shape", tensor.shape), dtype=tensor.dtype, device="meta")
            for name, tensor in stored.items()
        }

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight by its name, one after the other; under ZeRO-3 each is whole for its turn only, collectively."""
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            gathered = deepspeed.zero.GatheredParameters([tensor]) if hasattr(tensor, "ds_id") else nullcontext()
            with gathered:
                yield name, tensor.detach()
