"""What every other system is given and gives back: the task of a rank, the model it trains, what it counted.

A peer is a script that is started once for each rank (``python peer_trainer.py TASK.json``, with RANK and WORLD_SIZE
set as torchrun sets them). It appends a line to a file after each optimizer step and writes its counts at the end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoProcessor, LlavaForConditionalGeneration, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one rank is to do: train on ``records`` in their order; ``timed`` of them, the last, are measured.

    grouped: put samples of like length side by side first, within the timed ones and within the others.
    """

    stage: int
    model: str
    images: str
    records: list[dict[str, Any]]
    timed: int
    samples_per_micro_batch: int
    micro_batches: int
    learning_rate: float
    progress: str
    counts: str
    grouped: bool

    def save(self, path: Path) -> None:
        """Write the task as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: str) -> Task:
        """The task of a file."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))

    def step_done(self) -> None:
        """Tell whoever watches that an optimizer step is over."""
        if rank() == 0:
            with Path(self.progress).open("a", encoding="utf-8") as file:
                file.write("{}\n")

    def finish(self, counts: Mapping[str, tuple[int, int]], losses: Mapping[int, float]) -> None:
        """Write tokens and trained tokens of each sample of this rank, and the loss of each step (from 1)."""
        content = {"samples": dict(counts), "losses": dict(losses)}
        Path(f"{self.counts}.{rank()}").write_text(json.dumps(content), encoding="utf-8")


def rank() -> int:
    """Number of this process."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def load_model(task: Task) -> Any:
    """The LLaVA model on one thread, with what the stage trains made trainable; the tower is frozen in both."""
    torch.set_num_threads(1)
    model = LlavaForConditionalGeneration.from_pretrained(task.model, dtype=torch.float32)
    model.config.use_cache = False
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    if task.stage == 2:
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    return model


def settings(task: Task, folder: str) -> dict[str, Any]:
    """Arguments of transformers' ``TrainingArguments`` and what derives from it."""
    return {
        "output_dir": folder,
        "num_train_epochs": 1,
        "per_device_train_batch_size": task.samples_per_micro_batch,
        "gradient_accumulation_steps": task.micro_batches,
        "train_sampling_strategy": "sequential",
        "learning_rate": task.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "remove_unused_columns": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        "ddp_backend": "gloo" if world_size() > 1 else None,
        "disable_tqdm": True,
    }


def losses_of(log_history: list[dict[str, Any]]) -> dict[int, float]:
    """The loss of each step as a ``Trainer`` logged it."""
    return {entry["step"]: entry["loss"] for entry in log_history if "loss" in entry}


class Records(Dataset[dict[str, Any]]):
    """The records as they are; the collator does the work."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.records[index]


class Collator:
    """Records to a padded batch with labels on the answers, end token included; counts what it makes.

    counts: of each sample, its tokens and its trained tokens.
    """

    def __init__(self, task: Task) -> None:
        self.processor: Any = AutoProcessor.from_pretrained(task.model)
        self.images = Path(task.images)
        self.stage = task.stage
        self.prompt_end = self.processor.tokenizer("a ASSISTANT:", add_special_tokens=False)["input_ids"][1:]
        self.counts: dict[str, tuple[int, int]] = {}

    def __call__(self, records: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Ids, mask and labels (B, T), pixel_values (N, 3, H, W)."""
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
    """Tells after every optimizer step of a ``Trainer``."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.task.step_done()
