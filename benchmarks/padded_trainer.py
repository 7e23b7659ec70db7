"""The other system: transformers' ``Trainer`` with a collator that pads, as its users write it.

    python benchmarks/padded_trainer.py TASK.json        (one process per rank, with RANK and WORLD_SIZE set)

Every attention and every logit of a padded position is computed. The vision tower is frozen, which here too means that
it runs without gradients. Appends a line after each optimizer step, and at the end one of the tokens of every sample.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one rank is to do: train on ``records`` in their order."""

    stage: int
    model: str
    images: str
    records: list[dict[str, Any]]
    samples_per_micro_batch: int
    micro_batches: int
    learning_rate: float
    progress: str
    counts: str

    def save(self, path: Path) -> None:
        """Write the task as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


class Records(Dataset[dict[str, Any]]):
    """The records as they are; the collator does the work."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.records[index]


class Collator:
    """Records to a padded batch with labels on the answers, end token included."""

    def __init__(self, processor: Any, images: Path, *, stage: int) -> None:
        self.processor = processor
        self.images = images
        self.stage = stage
        self.prompt_end = processor.tokenizer("a ASSISTANT:", add_special_tokens=False)["input_ids"][1:]
        self.counts: dict[str, tuple[int, int]] = {}

    def __call__(self, records: list[dict[str, Any]]) -> dict[str, Tensor]:
        texts = [self._text(record) for record in records]
        pictures = [self._picture(record["image"]) for record in records if "image" in record]
        batch = dict(self.processor(text=texts, images=pictures or None, padding=True, return_tensors="pt"))
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for row, record in enumerate(records):
            ids = batch["input_ids"][row].tolist()
            tokens = int(batch["attention_mask"][row].sum())
            for start, end in self._caption(tokens, ids) if self.stage == 1 else self._answers(ids):
                labels[row, start:end] = batch["input_ids"][row, start:end]
            self.counts[record["id"]] = (tokens, int((labels[row] != IGNORED).sum()))
        return {**batch, "labels": labels}

    def _text(self, record: dict[str, Any]) -> str:
        turns = record["conversations"]
        if self.stage == 1:
            return "<image>" + turns[1]["value"] + "\n"
        messages = [{"role": "system", "content": [{"type": "text", "text": record["system"]}]}]
        for turn in turns:
            mark, _, text = turn["value"].rpartition("<image>\n")
            content = [{"type": "text", "text": text}]
            if mark or turn["value"] != text:
                content.insert(0, {"type": "image"})
            messages.append({"role": "user" if turn["from"] == "human" else "assistant", "content": content})
        return self.processor.apply_chat_template(messages)

    def _picture(self, name: str) -> Image.Image:
        with Image.open(self.images / name) as image:
            return image.convert("RGB")

    def _caption(self, tokens: int, ids: list[int]) -> list[tuple[int, int]]:
        image = self.processor.image_token_id
        return [(max(place for place, token in enumerate(ids) if token == image) + 1, tokens)]

    def _answers(self, ids: list[int]) -> list[tuple[int, int]]:
        spans, place, mark, end = [], 0, self.prompt_end, self.processor.tokenizer.eos_token_id
        while place < len(ids):
            if ids[place : place + len(mark)] == mark:
                start = place + len(mark)
                place = ids.index(end, start) + 1
                spans.append((start, place))
            else:
                place += 1
        return spans


class Progress(TrainerCallback):
    """Appends a line after every optimizer step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step}) + "\n")


def main(path: Path) -> None:
    task = Task(**json.loads(path.read_text(encoding="utf-8")))
    torch.set_num_threads(1)
    model = LlavaForConditionalGeneration.from_pretrained(task.model, dtype=torch.float32)
    model.config.use_cache = False
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    if task.stage == 2:
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    collator = Collator(AutoProcessor.from_pretrained(task.model), Path(task.images), stage=task.stage)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                num_train_epochs=1,
                per_device_train_batch_size=task.samples_per_micro_batch,
                gradient_accumulation_steps=task.micro_batches,
                train_sampling_strategy="sequential",
                learning_rate=task.learning_rate,
                lr_scheduler_type="constant",
                weight_decay=0.0,
                max_grad_norm=1.0,
                optim="adamw_torch_fused",
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                remove_unused_columns=False,
                dataloader_num_workers=0,
                dataloader_pin_memory=False,
                use_cpu=True,
                ddp_backend="gloo" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
                disable_tqdm=True,
            ),
            train_dataset=Records(task.records),
            data_collator=collator,
            callbacks=[Progress(Path(task.progress))],
        )
        trainer.train()
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    suffix = os.environ.get("RANK", "0")
    Path(f"{task.counts}.{suffix}").write_text(
        json.dumps({"samples": collator.counts, "losses": losses}), encoding="utf-8"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
