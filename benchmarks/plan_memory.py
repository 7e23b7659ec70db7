"""``mmit plan`` against measured peaks: ``python benchmarks/plan_memory.py [CASE ...]``.

Each case is a stage of a toy model (24 M parameters, 96 MB in fp32) trained for two steps of two micro-batches on CPU
ranks, in fresh processes, by the engine of ``mmit train``. Measured is what PyTorch's own allocator had handed out
(weights, gradients, optimizer, DeepSpeed's buffers, activations, what kernels need inside) at the worst moment of the
run, on the rank that held least: what a thread of gloo holds until it sends again differs from run to run. The resident
set would also count libraries, the heap's holes and what the kernel has not taken back, which at this size are more
than what is to be checked. On GPUs cases run that have a device for each rank.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from world import Size, World, make_parts

if TYPE_CHECKING:
    from mmit.config import RunConfig

SIZE = Size(
    pixels=112,
    vision_width=256,
    vision_layers=4,
    vision_heads=4,
    width=384,
    inner=1024,
    layers=8,
    heads=6,
    rows=8192,
)
LENGTH = 1024
MICRO_BATCHES, STEPS = 2, 2
ALLOWED = 0.15

BUCKETS = {
    "zero_optimization": {
        "reduce_bucket_size": 4_000_000,
        "stage3_prefetch_bucket_size": 1_000_000,
        "stage3_max_live_parameters": 8_000_000,
        "stage3_max_reuse_distance": 8_000_000,
    }
}
"""DeepSpeed's defaults are made for models a hundred times as large: a bucket would be 2 GB beside 96 MB of weights."""

SMALL_WORKSPACES = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "128"}
"""KiB that cuBLAS takes from PyTorch's allocator; the default, up to 32 MiB, would be a tenth of the toy's peak."""

BOTH = {"connector": 1e-4, "language_model": 1e-4}
RECOMPUTE = {"activation_checkpointing": True}
BF16 = {"precision": "bf16", "length": 256}  # which takes most CPUs ten times as long
LORA = {"train": {"connector": 1e-4, "lora": 1e-4}, "lora": {"rank": 16, "alpha": 32}}
STATES_OFF = {"offload_optimizer": "cpu"}
ALL_OFF = {**STATES_OFF, "offload_parameters": "cpu"}
CASES: dict[str, dict[str, Any]] = {
    "ZeRO-0, 1 rank": {"zero": 0},
    "ZeRO-0, 1 rank, recompute": {"zero": 0, **RECOMPUTE},
    "ZeRO-0, 2 ranks": {"zero": 0, "ranks": 2},
    "ZeRO-0, 2 ranks, bf16": {"zero": 0, "ranks": 2, **BF16},
    "ZeRO-1, 1 rank": {"zero": 1},
    "ZeRO-1, 2 ranks": {"zero": 1, "ranks": 2},
    "ZeRO-1, 2 ranks, bf16": {"zero": 1, "ranks": 2, **BF16},
    "ZeRO-2, 1 rank": {"zero": 2},
    "ZeRO-2, 1 rank, connector": {"zero": 2, "train": {"connector": 1e-4}},
    "ZeRO-2, 1 rank, LoRA": {"zero": 2, **LORA},
    "ZeRO-2, 1 rank, recompute, bf16": {"zero": 2, **RECOMPUTE, **BF16},
    "ZeRO-2, 2 ranks": {"zero": 2, "ranks": 2},
    "ZeRO-2, 2 ranks, recompute": {"zero": 2, "ranks": 2, **RECOMPUTE},
    "ZeRO-2, 2 ranks, offload optimizer": {"zero": 2, "ranks": 2, "offload": STATES_OFF},
    "ZeRO-3, 1 rank": {"zero": 3},
    "ZeRO-3, 2 ranks": {"zero": 3, "ranks": 2},
    "ZeRO-3, 2 ranks, bf16": {"zero": 3, "ranks": 2, **BF16},
    "ZeRO-3, 2 ranks, recompute": {"zero": 3, "ranks": 2, **RECOMPUTE},
    "ZeRO-3, 2 ranks, recompute, offload optimizer": {"zero": 3, "ranks": 2, **RECOMPUTE, "offload": STATES_OFF},
    "ZeRO-3, 2 ranks, recompute, offload all": {"zero": 3, "ranks": 2, **RECOMPUTE, "offload": ALL_OFF},
}


def main() -> None:
    """Predict and measure each case; a line for each; exit 1 where one is further off than ``ALLOWED``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", help="Parts of their names; else all.")
    asked = parser.parse_args().cases
    worst = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = World(folder, SIZE)
        make_parts(world)
        print("| case | predicted MB | measured MB | ratio |\n| --- | --- | --- | --- |")
        for case, changes in CASES.items():
            if asked and not any(word in case for word in asked):
                continue
            ranks = changes.get("ranks", 1)
            if ranks > _places():
                print(f"| {case} | not run: {_places()} GPU here | | |", flush=True)
                continue
            found = _launch(_run_file(world, **changes), ranks)
            ratio = found["predicted"] / found["measured"]
            worst = max(worst, abs(ratio - 1))
            print(
                f"| {case} | {found['predicted'] / 1e6:.0f} | {found['measured'] / 1e6:.0f} | {ratio:.2f} |", flush=True
            )
    sys.exit(worst > ALLOWED)


def _places() -> int:
    """Ranks that this machine has a device for."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 2


def _run_file(
    world: World,
    *,
    zero: int,
    ranks: int = 1,
    precision: str = "fp32",
    length: int = LENGTH,
    offload: dict[str, str] | None = None,
    **stage: Any,
) -> Path:
    filled = {
        "train": BOTH,
        "data": {"mix": [{"shards": "none"}]},
        "batch": {"length": length, "tokens_per_step": length * MICRO_BATCHES * ranks},
        "zero": {"stage": zero, "extra": BUCKETS, **(offload or {})},
        **stage,
    }
    content = {
        "name": "planned",
        "precision": precision,
        "model": {
            "encoder": {"type": "transformers", "path": str(world.tower)},
            "language_model": {"path": str(world.language_model), "template": "vicuna"},
        },
        "stages": {"measured": filled},
    }
    file = world.folder / "run.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file


def _launch(file: Path, ranks: int) -> dict[str, int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--rank", str(file)],
            env=common | SMALL_WORKSPACES | {"RANK": str(number), "LOCAL_RANK": str(number), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(ranks)
    ]
    ended = [process.communicate() for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(ended[0][1][-2000:])
    # a thread of gloo holds what it sent last until it sends again: more than the least of the ranks may be that
    return min((json.loads(out.splitlines()[-1]) for out, _ in ended), key=lambda found: found["measured"])


def _rank(file: Path) -> None:
    from mmit.train.stage import prepare_process

    prepare_process()
    import torch

    from mmit.config import load_config
    from mmit.train.engine import init_process_group

    init_process_group()
    print(json.dumps(predicted_and_measured(load_config(file))))
    torch.distributed.destroy_process_group()


def predicted_and_measured(config: RunConfig) -> dict[str, int]:
    """Bytes of this rank at the worst moment of the stage ``measured``, as planned and as PyTorch allocates them.

    Where what is offloaded lies in the same memory, as on CPU ranks, it is in both.
    """
    import torch
    from allocations import Allocations

    from mmit.models.activations import worst_batch
    from mmit.train.engine import device, resolve_precision
    from mmit.train.planner import Machine, plan_of
    from mmit.train.stage_parts import attend, build, make_engine

    stage = config.stages["measured"]
    ranks = torch.distributed.get_world_size()
    plan = plan_of(config, "measured", Machine(ranks=ranks, memory=0, rate=0))
    (choice,) = [c for c in plan.choices if c.way.apply(stage) == stage]
    dtype = resolve_precision(config.precision)
    micro_batches = stage.batch.rows_per_step // ranks
    with Allocations(device()) as allocations:
        loaded = build(config, "measured", dtype=dtype, tower=None)
        if stage.zero.number < 3:  # else weights would lie in files that are mapped
            for tensor in (*loaded.model.parameters(), *loaded.model.buffers()):
                tensor.data = tensor.data.clone()
        batch = worst_batch(loaded, plan.workload.row, rows=1)
        batch = replace(batch, pixels=torch.zeros(batch.pixels.shape, dtype=torch.uint8)).to(device())
        attend(loaded, stage, "measured")
        engine = make_engine(config, "measured", loaded, dtype=dtype)
        for _ in range(STEPS * micro_batches):
            engine.micro_step(batch, trained_tokens=batch.trained_tokens * micro_batches * ranks)
            engine.close_micro_step(factor=1.0)
    host = choice.memory.host if device().type == "cpu" else 0
    return {"predicted": choice.memory.bytes + host, "measured": allocations.peak}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        _rank(Path(sys.argv[2]))
    else:
        main()
