"""What a checkpoint costs: ``python benchmarks/saving.py``, or with ``--size full`` that of a model of 0.5 GB.

Two ranks train a model of 90 MB (fp32, random weights), all of it but the tower, under ZeRO-2 and ZeRO-3, and take
checkpoints in the step and in the background, in turn. Told are the seconds that training stands still and those until
the checkpoint is on disk (the median of ROUNDS), and the largest peak of anonymous memory above what a rank held
before; then the same of the model alone, as at the end of a stage.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from startup_memory import MEGABYTE, Peak, run_ranks, write_model

if TYPE_CHECKING:
    from mmit.models import LoadedModel
    from mmit.train.engine import Engine

LENGTH = 32
ROUNDS = 3
SIZES = {"toy": {"width": 512, "layers": 4}, "full": {"width": 1024, "layers": 8}}


def main() -> None:
    """Measure both stages of ZeRO in fresh processes, print a line for each way and rank."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="toy")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_model(folder, **SIZES[asked.size])
        print(f"model of {size / MEGABYTE:.0f} MB")
        for stage in ("2", "3"):
            for number, told in enumerate(run_ranks(__file__, str(folder), stage)):
                for way, (stall, seconds, peak) in json.loads(told).items():
                    print(
                        f"ZeRO-{stage}  {way.replace('_', ' '):<20} rank {number}  stands still {stall:6.2f} s  "
                        f"on disk after {seconds:6.2f} s  "
                        f"peak {peak / MEGABYTE:6.0f} MB ({peak / size:.2f} of the model)",
                        flush=True,
                    )


def _rank(folder: Path, stage: int) -> None:
    import torch

    from mmit.train.checkpoint import RunState
    from mmit.train.engine import init_process_group
    from mmit.train.model_writer import ModelWriter
    from mmit.train.saving import Saver

    torch.set_num_threads(1)
    init_process_group()
    loaded, engine = _engine(folder, stage)
    out = folder / f"checkpoints-{stage}"
    writer = ModelWriter(engine, loaded, dict, None, out)
    saver = Saver(out, engine, writer, keep_last=1, background=True, on_failure=lambda: None)
    seen: dict[str, list[tuple[float, float, int]]] = {}
    for step in range(2 * ROUNDS):
        in_step = step % 2 == 0
        state = RunState(
            step=step, stage="measured", plan="", world=2, zero_stage=stage, precision="float32", settings={}
        )
        with Peak() as peak:
            begins = time.perf_counter()
            saver.save(state, in_step=in_step)
            stall = time.perf_counter() - begins
            saver.finish()
            seconds = time.perf_counter() - begins
        seen.setdefault("in_the_step" if in_step else "in_the_background", []).append((stall, seconds, peak.bytes))
    with Peak() as peak:
        begins = time.perf_counter()
        saver.write_model(folder / f"model-{stage}")
        seconds = time.perf_counter() - begins
    seen["the_model_alone"] = [(seconds, seconds, peak.bytes)]
    saver.close()
    told = {}
    for way, found in seen.items():
        stalls, waits, peaks = zip(*found, strict=True)
        told[way] = median(stalls), median(waits), max(peaks)
    print(json.dumps(told, separators=(",", ":")))
    torch.distributed.destroy_process_group()


def _engine(folder: Path, stage: int) -> tuple[LoadedModel, Engine]:
    """The model under ZeRO, after one step of the optimizer."""
    import torch

    from mmit.batch import Batch
    from mmit.config import ComposedModel, Zero
    from mmit.models import build_model
    from mmit.train.deepspeed_settings import deepspeed_config
    from mmit.train.engine import Engine
    from mmit.train.optim import adamw, parameter_groups

    section = ComposedModel.model_validate_json((folder / "section.json").read_text(encoding="utf-8"))
    loaded = build_model(section, dtype=torch.float32, seed=0)
    groups = loaded.model.train_only({"connector": 1e-4, "language_model": 1e-4})
    settings = deepspeed_config(
        Zero(stage=stage), dtype=torch.float32, rows_per_micro_batch=1, micro_batches=1, clip_norm=1.0
    )
    optimizer = adamw(parameter_groups(loaded.model, groups, weight_decay=0.0), betas=(0.9, 0.999), eps=1e-8)
    engine = Engine(loaded.model, optimizer, settings, dtype=torch.float32)
    ids = torch.ones((1, LENGTH), dtype=torch.int64)
    batch = Batch(
        input_ids=ids,
        position_ids=torch.arange(LENGTH).view(1, -1),
        labels=ids,
        pixels=torch.zeros((0, 3, *loaded.model.spec.size), dtype=torch.uint8),
        trained_tokens=LENGTH,
        sample_ids=("a",),
        tokens=LENGTH,
    )
    engine.micro_step(batch, trained_tokens=2 * LENGTH)
    engine.close_micro_step(factor=1.0)
    return loaded, engine


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[2].isdigit():  # a rank
        _rank(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        main()
