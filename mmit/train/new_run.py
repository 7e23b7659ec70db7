"""``mmit new``: a run file that tunes a finished model on one's own shards, with numbers that fit their size."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mmit.config_file import parse
from mmit.data import measure_lengths, open_source
from mmit.errors import ConfigError, DataError
from mmit.train.defaults import CONNECTOR_RATE, DROPOUT, LORA_RATE, Defaults, Lengths, choose, held_out

STAGE = "tune"
_MAX_SKIPPED = 0.01
"""Broken samples are told one by one anyway; of 100 samples, 0.001 would allow none."""


@dataclass(frozen=True, kw_only=True)
class Sets:
    """The shards to train on, and those to measure on (none: a part of the first)."""

    data: str
    held_out: str = ""


def write_new_run(file: Path, model: str, sets: Sets) -> list[str]:
    """Write the run file and give what is to be told about it. Raises MmitError subclasses; ``file`` must not exist."""
    if file.exists():
        raise ConfigError(f"{file}: exists; name another file, or remove it")
    if sets.held_out and Path(sets.held_out).resolve() == Path(sets.data).resolve():
        raise ConfigError(f"--held-out {sets.held_out}: is what is trained on; leave it out, and a part is kept apart")
    samples, lengths, refused = _measured(model, sets.data)
    apart = 0 if sets.held_out else held_out(samples)
    chosen = choose(samples - apart, lengths)
    content = {"name": _name(file), "model": {"path": model}, "stages": {STAGE: _stage(sets, samples, apart, chosen)}}
    told = _told(samples, apart, chosen, sets)
    head = [
        f"Tunes {model} with LoRA on {sets.data}.",
        *told,
        "docs/finetune.md says why the numbers are what they are.",
    ]
    comment = "".join(f"# {' '.join(line.split())}\n" for line in head)
    text = comment + yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)
    config = parse(text, source=str(file), overrides=[])
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written: {error.strerror}") from None
    result = config.stage_folder(STAGE)
    return [f"wrote {file}", *told, *refused, f"next: mmit train {file}, whose result will be {result}"]


def _measured(model: str, data: str) -> tuple[int, Lengths, list[str]]:
    """The number of samples that can be used, their lengths, and a sentence about the others."""
    from mmit.config import Data, Source, WholeModel
    from mmit.models import read_outline
    from mmit.train.feed import make_encode

    shards = open_source(data)
    outline = read_outline(WholeModel(path=model))
    encode = make_encode(Data(mix=[Source(shards=data)]), outline)
    table = measure_lengths(shards, encode.measure, fingerprint=encode.fingerprint(), max_skipped=_MAX_SKIPPED)
    tokens = table.tokens[table.tokens > 0]
    if not len(tokens):
        raise DataError(f"{data}: holds no sample that can be trained on")
    lengths = Lengths(mean=float(tokens.mean()), longest=int(tokens.max()), context=outline.context)
    lost = len(table) - len(tokens)
    told = [f"{lost} of {len(table)} samples are left out: broken, or in quarantine"] if lost else []
    over = int((tokens > lengths.context).sum()) if lengths.context else 0
    if over:
        told.append(f"{over} samples are longer than the {lengths.context} tokens the model takes: they lose turns")
    return len(table), lengths, told


def _stage(sets: Sets, samples: int, apart: int, chosen: Defaults) -> dict[str, Any]:
    train: dict[str, Any] = {"shards": sets.data}
    measured: dict[str, Any] = {"shards": sets.held_out or sets.data}
    if apart:
        train["subset"], measured["subset"] = f"first {samples - apart}", f"last {apart}"
    every = chosen.measure_every
    stage: dict[str, Any] = {
        "lora": {"rank": chosen.rank, "alpha": 2 * chosen.rank, "dropout": DROPOUT},
        "train": {"lora": LORA_RATE, "connector": CONNECTOR_RATE},
        "data": {"mix": [train], "too_long": "drop_turns", "max_skipped": _MAX_SKIPPED},
        "evaluate": {"mix": [measured], "every_steps": every, "samples": 1000, "text": "probe"},
        "batch": {"length": chosen.length, "tokens_per_step": chosen.length * chosen.rows_per_step},
        "epochs": chosen.epochs,
        "optim": {"schedule": "cosine", "warmup_fraction": chosen.warmup_fraction},
        "save": {"every_steps": every, "keep_best": True},
        "activation_checkpointing": "auto",
    }
    if not apart and not sets.held_out:
        del stage["evaluate"], stage["save"]["keep_best"]
    return stage


def _told(samples: int, apart: int, chosen: Defaults, sets: Sets) -> Sequence[str]:
    epochs = f"{chosen.epochs} epoch{'s'[: chosen.epochs > 1]}"
    rows = f"{chosen.rows_per_step} row{'s'[: chosen.rows_per_step > 1]} of {chosen.length} tokens"
    trained = f"{samples - apart:,} samples in {epochs}: about {chosen.steps:,} steps of {rows}"
    every = f"measured every {chosen.measure_every} steps"
    if sets.held_out:
        return [trained, f"held out: {sets.held_out}, {every}"]
    if apart:
        return [trained, f"held out: {apart:,} samples, {every}"]
    return [trained, "held out: nothing, so few samples there are; overfitting will not be seen"]


def _name(file: Path) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "-", file.stem).lstrip("_.-") or "tune"
