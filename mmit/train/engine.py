"""DeepSpeed's part: its dictionary, its engine, and the few questions that only it can answer."""

from __future__ import annotations

import logging
import resource
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from mmit.config import Zero
from mmit.distributed import local_rank, world_size
from mmit.errors import ConfigError
from mmit.train.deepspeed_keys import check_keys

OWNED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
    "zero_optimization.stage",
    "zero_optimization.offload_optimizer",
)
"""Keys of DeepSpeed's dictionary that mmit derives from the run file; ``zero.extra`` may not set them."""


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
    if get_accelerator().device_name() == "cuda":
        take_device()
        deepspeed.init_distributed(dist_backend="nccl", verbose=False)
    else:
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def resolve_precision(asked: str) -> torch.dtype:
    """The dtype of the weights: ``auto`` is bf16 on an accelerator, fp32 on CPU, where bf16 has no fast path."""
    if asked == "auto":
        asked = "fp32" if get_accelerator().device_name() == "cpu" else "bf16"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[asked]


def accumulation(*, rows_per_step: int, rows_per_micro_batch: int) -> int:
    """Micro-batches of an optimizer step on each rank; the last one of a rank may hold empty rows."""
    return -(-rows_per_step // (world_size() * rows_per_micro_batch))


def deepspeed_config(
    zero: Zero, *, dtype: torch.dtype, rows_per_micro_batch: int, micro_batches: int, clip_norm: float
) -> dict[str, Any]:
    """DeepSpeed's dictionary for one stage. Raises ConfigError where ``zero.extra`` is refused."""
    if zero.offload_optimizer == "cpu" and zero.stage == 0:
        raise ConfigError(
            "zero.offload_optimizer: cpu needs zero.stage 1, 2 or 3; stage 0 partitions nothing that could be moved"
        )
    # In bf16 without ZeRO, DeepSpeed makes an optimizer step on zero gradients before the first one: weights decay and
    # Adam's bias correction is one step ahead. Its stage 1 computes the same numbers without that.
    stage = 1 if zero.stage == 0 and dtype != torch.float32 else zero.stage
    sections: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": dtype != torch.float32,
    }
    if zero.offload_optimizer == "cpu":
        sections["offload_optimizer"] = {
            "device": "cpu",
            "pin_memory": get_accelerator().device_name() != "cpu",
        }
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": rows_per_micro_batch,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": clip_norm,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": sections,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW serves on CPU too and compiles nothing
        "steps_per_print": 10**12,
    }
    _merge(config, zero.extra, "")
    check_keys(config, zero.extra)
    return config


def _merge(config: dict[str, Any], extra: dict[str, Any], prefix: str) -> None:
    for key, value in extra.items():
        path = f"{prefix}{key}"
        if isinstance(config.get(key), dict) and not isinstance(value, dict):
            raise ConfigError(f"zero.extra: '{path}' is a section of DeepSpeed's dictionary, not the value {value!r}")
        if path in OWNED:
            raise ConfigError(f"zero.extra: '{path}' is set by mmit from the run file; change it there")
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            _merge(config[key], value, f"{path}.")
        else:
            config[key] = value


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
        self.deepspeed.train()  # models are built in evaluation mode, without dropout and recomputation
        self.optimizer = self.deepspeed.optimizer
        self.zero_stage: int = config["zero_optimization"]["stage"]

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
        bit of the weights and of the optimizer's state as it was; the same on every rank.
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
        with nullcontext() if update else self._without_update():
            self.deepspeed.step()
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

    def full_state(self) -> dict[str, Tensor]:
        """All weights on rank 0, an empty dict elsewhere; under ZeRO-3 a collective call that gathers one at a time."""
        is_first = torch.distributed.get_rank() == 0
        if self.zero_stage < 3:
            return dict(self.module.state_dict()) if is_first else {}
        kept = self.module.state_dict().keys()  # buffers that are not persistent belong to no checkpoint
        state = {name: buffer for name, buffer in self.module.named_buffers() if is_first and name in kept}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            with deepspeed.zero.GatheredParameters([parameter]):
                if is_first:
                    state[name] = parameter.detach().to("cpu", copy=True)
        return state
