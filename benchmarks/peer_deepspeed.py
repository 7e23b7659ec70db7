"""A DeepSpeed loop as it is written by hand: ZeRO-2, padded batches, the model's own loss of each micro-batch.

    python benchmarks/peer_deepspeed.py TASK.json        (one process per rank, with RANK and WORLD_SIZE set)

Its loss is the mean of the micro-batches' means, so samples in a micro-batch with few trained tokens weigh more than
they do in the other systems; the work is the same.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import defaultdict
from statistics import mean

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
from peer_task import Collator, Task, load_model, rank, world_size


def main(task: Task) -> None:
    """Train and tell."""
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, str(value))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # only inference uses this op, and building it takes a compiler
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if world_size() == 1:
        os.environ.setdefault("MASTER_PORT", "0")
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    model, collator = load_model(task), Collator(task)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(trained, lr=task.learning_rate, weight_decay=0.0, fused=True),
        config={
            "train_micro_batch_size_per_gpu": task.samples_per_micro_batch,
            "gradient_accumulation_steps": task.micro_batches,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        },
    )
    size = task.samples_per_micro_batch
    batches = [task.records[place : place + size] for place in range(0, len(task.records), size)]
    losses: defaultdict[int, list[float]] = defaultdict(list)
    for number, records in enumerate(batches[rank() :: world_size()]):
        loss = engine(**collator(records)).loss
        engine.backward(loss)
        engine.step()
        losses[number // task.micro_batches + 1].append(float(loss.detach()))
        if (number + 1) % task.micro_batches == 0:
            task.step_done()
    task.finish(collator.counts, {step: mean(values) for step, values in losses.items()})
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Task.read(sys.argv[1]))
