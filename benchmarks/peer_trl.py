"""TRL's ``SFTTrainer`` on its way for vision-language models: its own collator, loss on the answers only.

    python benchmarks/peer_trl.py TASK.json        (one process per rank, with RANK and WORLD_SIZE set)

TRL pads: it refuses packing and padding-free batches for data with pictures. Activation checkpointing, which it turns
on by itself, is off as in the other systems.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from itertools import count
from pathlib import Path
from typing import Any

from peer_task import IGNORED, Progress, Task, load_model, losses_of, rank, settings, world_size
from torch import Tensor
from transformers import AutoProcessor

# of the extra `bench`, which the type checker's environment need not hold
trl: Any = importlib.import_module("trl")
datasets: Any = importlib.import_module("datasets")

CAPTION = "{{ bos_token }}<image>{% generation %}{{ messages[1]['content'][0]['text'] + '\n' }}{% endgeneration %}"
"""Stage 1: the picture, the caption, a line feed."""


class Counting:
    """TRL's own collator; notes tokens and trained tokens of every row that it makes.

    ids: of the samples in the order in which this rank is given them.
    """

    def __init__(self, collator: Any, ids: list[str]) -> None:
        self.collator = collator
        self.ids = iter(ids)
        self.counts: dict[str, tuple[int, int]] = {}

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch as TRL makes it."""
        batch = self.collator(examples)
        tokens, trained = batch["attention_mask"].sum(dim=1), (batch["labels"] != IGNORED).sum(dim=1)
        for pair in zip(tokens.tolist(), trained.tolist(), strict=True):
            self.counts[next(self.ids)] = pair
        return batch


def rows(task: Task) -> Any:
    """The records as a data set in TRL's form: messages, and images beside them."""
    content = [
        {
            "messages": [*_system(record), *map(_message, record["conversations"])],
            "images": [str(Path(task.images) / record["image"])] if "image" in record else [],
        }
        for record in task.records
    ]
    message = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = datasets.Features({"messages": [message], "images": datasets.List(datasets.Image())})
    return datasets.Dataset.from_list(content, features=features)


def _system(record: dict[str, Any]) -> list[dict[str, str]]:
    return [{"role": "system", "content": record["system"]}] if "system" in record else []


def _message(turn: dict[str, str]) -> dict[str, str]:
    # TRL puts the place of the picture before the first question itself
    text = turn["value"].replace("<image>\n", "").replace("<image>", "")
    return {"role": "user" if turn["from"] == "human" else "assistant", "content": text}


def own_samples(task: Task) -> list[str]:
    """Ids of this rank's samples: accelerate deals whole batches to the ranks in turn."""
    size = task.samples_per_micro_batch
    names = [record["id"] for record in task.records]
    return [name for place, name in zip(count(), names) if place // size % world_size() == rank()]


def main(task: Task) -> None:
    """Train and tell."""
    model = load_model(task)
    processor: Any = AutoProcessor.from_pretrained(task.model)
    processor.chat_template = CAPTION if task.stage == 1 else "{{ bos_token }}" + processor.chat_template
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(
                **settings(task, folder),
                bf16=False,
                gradient_checkpointing=False,
                assistant_only_loss=True,
                max_length=None,
            ),
            train_dataset=rows(task),
            processing_class=processor,
            callbacks=[Progress(task)],
        )
        collator = trainer.data_collator = Counting(trainer.data_collator, own_samples(task))
        trainer.train()
    task.finish(collator.counts, losses_of(trainer.state.log_history))


if __name__ == "__main__":
    main(Task.read(sys.argv[1]))
