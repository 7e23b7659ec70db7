"""``mmit plan`` against measured peaks: ``python benchmarks/plan_memory.py [CASE ...]``.

Each case is a stage of a toy model (24 M parameters, 96 MB in fp32) trained for two steps of two micro-batches on CPU
ranks, in fresh processes, by the engine of ``mmit train``. Counted are the bytes of all live tensors (weights,
gradients, optimizer, DeepSpeed's buffers, activations) from their birth to their death, at the worst moment of the run
on rank 0; the resident set would also count libraries, the heap's holes and what the kernel has not taken back, which
at this size are more than what is to be checked. Where a CUDA device is there, PyTorch's allocator is asked instead.
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
from typing import Any

import yaml
from world import Size, World, make_parts

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

BOTH = {"connector": 1e-4, "language_model": 1e-4}
RECOMPUTE = {"activation_checkpointing": True}
LORA = {"train": {"connector": 1e-4, "lora": 1e-4}, "lora": {"rank": 16, "alpha": 32}}
CASES: dict[str, dict[str, Any]] = {
    "ZeRO-0, 1 rank": {"zero": 0},
    "ZeRO-0, 1 rank, recompute": {"zero": 0, **RECOMPUTE},
    "ZeRO-1, 1 rank": {"zero": 1},
    "ZeRO-2, 1 rank": {"zero": 2},
    "ZeRO-2, 1 rank, connector": {"zero": 2, "train": {"connector": 1e-4}},
    "ZeRO-2, 1 rank, LoRA": {"zero": 2, **LORA},
    "ZeRO-2, 1 rank, recompute, bf16": {"zero": 2, **RECOMPUTE, "precision": "bf16"},
    "ZeRO-1, 2 ranks": {"zero": 1, "ranks": 2},
    "ZeRO-2, 2 ranks": {"zero": 2, "ranks": 2},
    "ZeRO-3, 2 ranks": {"zero": 3, "ranks": 2},
    "ZeRO-3, 2 ranks, recompute": {"zero": 3, "ranks": 2, **RECOMPUTE},
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
            file = _run_file(world, **{key: value for key, value in changes.items() if key != "ranks"}, ranks=ranks)
            found = _launch(file, ranks)
            ratio = found["predicted"] / found["measured"]
            worst = max(worst, abs(ratio - 1))
            print(
                f"| {case} | {found['predicted'] / 1e6:.0f} | {found['measured'] / 1e6:.0f} | {ratio:.2f} |", flush=True
            )
    sys.exit(worst > ALLOWED)


def _run_file(world: World, *, zero: int, ranks: int, precision: str = "fp32", **stage: Any) -> Path:
    filled = {
        "train": BOTH,
        "data": {"mix": [{"shards": "none"}]},
        "batch": {"length": LENGTH, "tokens_per_step": LENGTH * MICRO_BATCHES * ranks},
        "zero": {"stage": zero, "extra": BUCKETS if zero else {}},
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
            env=common | {"RANK": str(number), "LOCAL_RANK": str(number), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(ranks)
    ]
    ended = [process.communicate() for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(ended[0][1][-2000:])
    return json.loads(ended[0][0].splitlines()[-1])


def _rank(file: Path) -> None:
    from mmit.train.stage import prepare_process

    prepare_process()
    import torch

    from mmit.config import load_config
    from mmit.models.activations import worst_batch
    from mmit.models.live_tensors import LiveTensors
    from mmit.train.engine import device, init_process_group, resolve_precision
    from mmit.train.planner import Machine, plan_of
    from mmit.train.stage_parts import attend, build, make_engine

    init_process_group()
    config = load_config(file)
    stage = config.stages["measured"]
    ranks = torch.distributed.get_world_size()
    plan = plan_of(config, "measured", Machine(ranks=ranks, memory=0, rate=0))
    asked = (stage.zero.number, "none", stage.activation_checkpointing)
    (choice,) = [c for c in plan.choices if (c.way.zero_stage, c.way.offload, c.way.recompute) == asked]

    on_device = device().type != "cpu"
    dtype = resolve_precision(config.precision)
    loaded = build(config, "measured", dtype=dtype, tower=None)
    if stage.zero.number < 3:  # else weights would lie in files that are mapped
        for tensor in (*loaded.model.parameters(), *loaded.model.buffers()):
            tensor.data = tensor.data.clone()
    batch = worst_batch(loaded, plan.workload.row, rows=1)
    batch = replace(batch, pixels=torch.zeros(batch.pixels.shape, dtype=torch.uint8)).to(device())
    held = [getattr(parameter, "ds_tensor", parameter) for parameter in loaded.model.parameters()]
    with LiveTensors() as live:
        live.count([*held, *loaded.model.buffers()])
        held.clear()
        attend(loaded, stage, "measured")
        engine = make_engine(config, "measured", loaded, dtype=dtype)
        for _ in range(STEPS * MICRO_BATCHES):
            engine.micro_step(batch, trained_tokens=batch.trained_tokens * MICRO_BATCHES * ranks)
            engine.close_micro_step(factor=1.0)
    measured = torch.cuda.max_memory_allocated() if on_device else live.peak
    print(json.dumps({"predicted": choice.memory.bytes, "measured": measured}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        _rank(Path(sys.argv[2]))
    else:
        main()
