"""DeepSpeed's dictionary: made from the run file's words, with ``zero.extra`` merged last.

Keys that mmit derives from the run file, and keys that would leave the state of the optimizer where checkpoints by
parameter name do not look for it, may not be set by ``zero.extra``.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from mmit.config import Zero
from mmit.errors import ConfigError
from mmit.train.deepspeed_keys import check_keys

_MOVED = ("zero_optimization.offload_optimizer", "zero_optimization.offload_param")

OWNED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16.enabled",
    "zero_optimization.stage",
    *(f"{section}.{key}" for section in _MOVED for key in ("device", "nvme_path")),
)
"""Keys of DeepSpeed's dictionary that mmit derives from the run file; ``zero.extra`` may not set them."""

STATE_ELSEWHERE = (
    "fp16.auto_cast",
    "fp16.fp16_master_weights_and_grads",
    "torch_autocast",
    "zero_optimization.zenflow",
    "zero_optimization.mics_shard_size",
    "zero_optimization.round_robin_gradients",  # its flat tensors are in another order than DeepSpeed says
    "zero_optimization.offload_optimizer.ratio",
    "zero_optimization.offload_optimizer.super_offload",
    "zero_optimization.offload_optimizer.pipeline_read",
    "zero_optimization.offload_optimizer.pipeline_write",
)
"""Keys with which weights, moments or the loss scale lie where checkpoints by parameter name do not look for them."""


def accumulation(*, rows_per_step: int, rows_per_micro_batch: int, readers: int) -> int:
    """Micro-batches of an optimizer step on each reader; the last one of a reader may hold empty rows."""
    return -(-rows_per_step // (readers * rows_per_micro_batch))


def deepspeed_config(
    zero: Zero, *, dtype: torch.dtype, rows_per_micro_batch: int, micro_batches: int, clip_norm: float
) -> dict[str, Any]:
    """DeepSpeed's dictionary for one stage. Raises ConfigError where ``zero.extra`` is refused."""
    # In bf16 without ZeRO, DeepSpeed makes an optimizer step on zero gradients before the first one: weights decay and
    # Adam's bias correction is one step ahead. In fp16 it keeps its loss scale and master weights in a class of its
    # own. Its stage 1 computes the same numbers without either.
    stage = 1 if zero.number == 0 and dtype != torch.float32 else zero.number
    sections: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": dtype != torch.float32,
    }
    for section, place in (("offload_optimizer", zero.offload_optimizer), ("offload_param", zero.offload_parameters)):
        if place != "none":
            sections[section] = {"device": place, "pin_memory": get_accelerator().device_name() != "cpu"}
        if place == "nvme":
            sections[section]["nvme_path"] = zero.nvme_path
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": rows_per_micro_batch,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": clip_norm,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
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
        if path in STATE_ELSEWHERE:
            raise ConfigError(f"zero.extra: with '{path}' the state could not be saved by parameter name; take it out")
        if path in _MOVED and key not in config:
            raise ConfigError(f"zero.extra: '{path}' needs {_key_of(path)} in the run file; set that first")
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            _merge(config[key], value, f"{path}.")
        else:
            config[key] = value


def _key_of(path: str) -> str:
    return "zero.offload_optimizer" if path.endswith("optimizer") else "zero.offload_parameters"
