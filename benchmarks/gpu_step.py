"""Optimizer steps of mmit's engine on one device: their time, memory, operations, and where a step's time goes.

The steps are those of ``mmit train`` (mmit.train.loop) without the reading of data, which benchmarks/loader.py times.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from typing import Any

import torch
from gpu_model import SHAPES, build, lengths, steps, work
from torch.profiler import ProfilerActivity, profile

from mmit.batch import IGNORE, Batch
from mmit.config import RunConfig
from mmit.train.engine import Engine, init_process_group, peak_memory
from mmit.train.stage import prepare_process
from mmit.train.stage_parts import attend, make_engine

STAGE = "measured"
KINDS = (
    ("attention", r"flash|fmha|attention|attn"),
    ("matrix products", r"gemm|gemv|cutlass|nvjet|xmma|::mm\b|addmm|bmm|matmul|linear|conv"),
    ("optimizer", r"adam|multi_tensor|foreach|l2norm"),
    ("communication", r"nccl|gloo|all_reduce|allreduce|c10d|broadcast"),
    ("copies and look-ups", r"memcpy|memset|copy|::to\b|cat|index|gather|scatter|embedding|fill|zero|contiguous"),
    ("element-wise and norms", r"elementwise|vectorized|norm|silu|gelu|softmax|reduce|triton|::\w+_?$"),
)
"""What a kernel's name says it does; the first that matches."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured: a stage of a size, steps of ``rows`` rows of ``length`` tokens.

    settings: more keys of the run file's stage.
    """

    size: str
    stage: int
    length: int
    rows: int
    settings: dict[str, Any]
    device: str
    steps: int
    warmup: int

    @property
    def dtype(self) -> torch.dtype:
        """bf16, and fp32 on CPUs."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    def config(self) -> RunConfig:
        """As a run file would have it, but for the model, which is made in memory."""
        parts = ("connector", "language_model")[: self.stage]
        content = {
            "train": dict.fromkeys(parts, 1e-5),
            "data": {"mix": [{"shards": "none"}]},
            "batch": {"length": self.length, "tokens_per_step": self.length * self.rows},
            "zero": {"stage": 0},
            **self.settings,
        }
        return RunConfig.model_validate(
            {"name": self.size, "model": {"path": "random weights"}, "stages": {STAGE: content}}
        )


def measure(case: Case) -> dict[str, Any]:
    """Everything about one case, as values that JSON can hold."""
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "0")
    prepare_process()
    init_process_group()
    shape = SHAPES[case.size]
    loaded = build(shape, dtype=case.dtype, device=case.device)
    config = case.config()
    attend(loaded, config.stages[STAGE], STAGE)
    engine = make_engine(config, STAGE, loaded, dtype=case.dtype)
    weights = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    data = steps(shape, case.stage, length=case.length, rows=case.rows, count=case.warmup + case.steps + 1)
    timed = data[case.warmup : -1]
    for step in data[: case.warmup]:
        _step(engine, step, case.device)
    held = _allocated(case.device)
    _forget_peak(case.device)
    seconds = [_step(engine, step, case.device) for step in timed]
    peak = peak_memory()
    profiled = profile_step(engine, data[-1], case.device)
    torch.distributed.destroy_process_group()
    return {
        "attention": loaded.model.attention,
        "seconds": seconds,
        "held_bytes": {"weights": weights, "beside weights between steps": max(0, held - weights)},
        "peak_bytes": peak,
        "profile": profiled,
        **counts(case, [batch for step in timed for batch in step]),
    }


def counts(case: Case, batches: list[Batch]) -> dict[str, Any]:
    """Samples, tokens and useful operations of some batches."""
    of = lengths(batches)
    labels = sum(int((batch.labels != IGNORE).sum()) for batch in batches)
    tiles = sum(batch.tiles for batch in batches)
    squares = int((of**2).sum())
    tokens = int(of.sum())
    flops = work(SHAPES[case.size], case.stage, tokens=tokens, squares=squares, labels=labels, tiles=tiles)
    return {"samples": len(of), "tokens": tokens, "trained_tokens": labels, "tiles": tiles, "flops": flops}


def profile_step(engine: Engine, step: list[Batch], device: str) -> dict[str, Any]:
    """Milliseconds of a step by kind of kernel, the longest kernels, and the time without any."""
    on_gpu = device != "cpu"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        seconds = _step(engine, step, device)
    kernels: dict[str, float] = {}
    for event in profiler.key_averages():
        # a range that is only named (the optimizer's step) spans kernels that are counted themselves
        is_kernel = "cuda" in str(event.device_type).lower() and not event.is_user_annotation if on_gpu else True
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if is_kernel and spent > 0:
            kernels[event.key] = kernels.get(event.key, 0.0) + spent / 1000
    kinds: dict[str, float] = {}
    for name, spent in kernels.items():
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0.0) + spent
    longest = sorted(kernels, key=kernels.__getitem__, reverse=True)[:12]
    return {
        "milliseconds": 1000 * seconds,
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "longest": {name[:90]: kernels[name] for name in longest},
        "idle": max(0.0, 1000 * seconds - sum(kernels.values())),
    }


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel, re.IGNORECASE)), "other")


def _step(engine: Engine, step: list[Batch], device: str) -> float:
    """Seconds of one optimizer step, as the training loop makes it."""
    trained = sum(batch.trained_tokens for batch in step)
    _synchronize(device)
    started = time.perf_counter()
    for batch in step:
        engine.micro_step(batch.to(device), trained_tokens=trained)
        engine.close_micro_step(factor=1.0)
    _synchronize(device)
    return time.perf_counter() - started


def _allocated(device: str) -> int:
    return 0 if device == "cpu" else int(torch.cuda.memory_allocated())


def _forget_peak(device: str) -> None:
    """What the engine took while it was made, and the first steps, is not the peak of a step."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()
