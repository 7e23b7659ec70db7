"""transformers' ``Trainer`` with a collator that pads, as its users write it; samples in random order or by length.

    python benchmarks/peer_trainer.py TASK.json        (one process per rank, with RANK and WORLD_SIZE set)

Every attention and every logit of a padded position is computed. The vision tower is frozen, which here too means that
it runs without gradients.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch
from peer_task import Collator, Progress, Records, Task, load_model, losses_of, settings
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

BATCHES_IN_A_GROUP = 50
"""What ``Trainer`` sorts at a time with ``group_by_length``, in batches; fewer only where there are not so many."""


def grouped(records: list[dict[str, Any]], *, batch: int) -> list[dict[str, Any]]:
    """The records in the order of ``train_sampling_strategy="group_by_length"``, by their ``tokens``."""
    order = get_length_grouped_indices(
        [record["tokens"] for record in records],
        batch,
        mega_batch_mult=BATCHES_IN_A_GROUP,
        generator=torch.Generator().manual_seed(0),
    )
    return [records[place] for place in order]


def main(task: Task) -> None:
    """Train and tell."""
    records = task.records
    if task.grouped:
        # by hand, because the sampler would also move samples between the warm-up and the timed steps
        first = len(records) - task.timed
        batch = task.samples_per_micro_batch * task.micro_batches
        records = grouped(records[:first], batch=batch) + grouped(records[first:], batch=batch)
    model, collator = load_model(task), Collator(task)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**settings(task, folder)),
            train_dataset=Records(records),
            data_collator=collator,
            callbacks=[Progress(task)],
        )
        trainer.train()
    task.finish(collator.counts, losses_of(trainer.state.log_history))


if __name__ == "__main__":
    main(Task.read(sys.argv[1]))
