"""What a checkpoint holds, told from descriptions and headers alone: any directory or weight file, whole or not.

What is wrong is listed, not raised: a checkpoint that cannot be opened is the one that is looked at most.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmit.errors import CheckpointError, ConfigError
from mmit.models.adapter_names import holds_adapter
from mmit.models.headers import TensorHeader, read_headers
from mmit.models.inspection_facts import facts_of, kind_of, misfits

Json = dict[str, Any]

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
"""Endings of files that hold tensors."""

_NOT_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth")
# beginnings of tensor names, the first that is found -> part; peft's wrapper is taken off before
_PARTS = (
    ("adapter", ("lora_",)),
    ("vision tower", ("vision_tower.", "vision_model.", "vision_backbone", "visual.", "embeddings.", "encoder.")),
    ("vision tower", ("pre_layrnorm.", "post_layernorm.", "layernorm.", "head.")),
    ("connector", ("mm_projector", "multi_modal_projector", "connector.", "image_newline", "qformer.", "query_tokens")),
    ("connector", ("language_projection", "projector")),
    ("language model", ("language_model.", "llm_backbone", "model.", "lm_head.", "transformer.", "gpt_neox.")),
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a checkpoint, by the names of its tensors."""

    name: str
    tensors: int
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]


@dataclass(kw_only=True)
class Inspection:
    """What was found at ``path``. facts: what config.json and its companions say; problems: what is wrong with it."""

    path: Path
    kind: str
    parts: list[Part] = field(default_factory=list)
    facts: Json = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> Json:
        """Plain values for JSON."""
        parts = [
            {"name": p.name, "tensors": p.tensors, "parameters": p.parameters, "bytes": p.bytes, "dtypes": [*p.dtypes]}
            for p in self.parts
        ]
        return {
            "path": str(self.path),
            "kind": self.kind,
            "parts": parts,
            "facts": self.facts,
            "problems": self.problems,
        }


def inspect(path: Path | str) -> Inspection:
    """What is at ``path``: a weight file, a model directory, a stage's folder, a checkpoint, a part alone.

    Raises CheckpointError only where there is nothing at all.
    """
    path = Path(path)
    if path.is_file():
        return _file(path)
    if not path.is_dir():
        raise CheckpointError(f"there is nothing at {path}")
    return _directory(path)


def _file(file: Path) -> Inspection:
    found = Inspection(path=file, kind="a weight file")
    if file.name.endswith(".index.json"):
        return _directory(file.parent)
    if file.suffix not in WEIGHTS:
        found.kind = "no weight file"
        found.problems.append(f"{file.name} ends in none of {', '.join(WEIGHTS)}")
        return found
    found.parts = _parts(_headers([file], found))
    return found


def _directory(directory: Path) -> Inspection:
    model = _model_folder(directory)
    found = Inspection(path=directory, kind="a directory without a model")
    if model is None:
        files = _weight_files(directory)
        if not files:
            found.problems.append("there is no config.json and no weight file here, in model/ or in a checkpoint")
            return found
        found.kind = "weight files without config.json"
        found.parts = _parts(_headers(files, found))
        return found
    _note_run(directory, model, found)
    base = model / "base" if holds_adapter(model) else model
    config, own = _json(base / "config.json", found), _json(model / "mmit.json", found)
    tensors = _headers(_weight_files(base) + (_weight_files(model) if base != model else []), found)
    found.kind = kind_of(base, config, own, found.problems)
    if base != model:
        found.kind = f"{found.kind}, with an adapter beside it"
    found.parts = _parts(tensors)
    found.facts |= facts_of(base, config, own)
    found.problems += misfits(config, tensors)
    _check_index(base, tensors, found)
    return found


def _model_folder(directory: Path) -> Path | None:
    """Where the model of a directory lies, as ``find_model_directory`` takes it."""
    from mmit.models.load import find_model_directory

    try:
        return find_model_directory(directory)
    except (CheckpointError, ConfigError):
        return None


def _note_run(directory: Path, model: Path, found: Inspection) -> None:
    """What stands around the model of a training run."""
    if model != directory:
        found.facts["model"] = str(model.relative_to(directory))
    steps = sorted(folder.name for folder in directory.glob("checkpoints/step-*") if (folder / "COMPLETE").is_file())
    if steps:
        found.facts["complete checkpoints"] = steps
    if directory.name.startswith("step-") and not (directory / "COMPLETE").is_file():
        found.problems.append("this checkpoint was never completed: there is no file COMPLETE")
    if (directory / "state.json").is_file():
        state = _json(directory / "state.json", found)
        found.facts["training"] = {name: state.get(name) for name in ("stage", "step", "world", "zero_stage")}


def _weight_files(directory: Path) -> list[Path]:
    """All files of tensors in a directory; those of an index and others alike. Pickles give way to safetensors."""
    candidates = (file for file in sorted(directory.iterdir()) if file.is_file())
    files = [file for file in candidates if file.suffix in WEIGHTS and file.name not in _NOT_WEIGHTS]
    whole = [file for file in files if file.name.startswith("model") and file.suffix == ".safetensors"]
    return [file for file in files if not (whole and file.name.startswith("pytorch_model"))]


def _headers(files: list[Path], found: Inspection) -> list[TensorHeader]:
    tensors: list[TensorHeader] = []
    for file in files:
        try:
            tensors += read_headers(file)
        except CheckpointError as error:
            found.problems.append(str(error))
    found.facts["weight files"] = {file.name: file.stat().st_size for file in files}
    empty = [tensor.name for tensor in tensors if not tensor.parameters]
    if empty:
        found.problems.append(f"{len(empty)} tensors are empty, as ZeRO-3 leaves them: {', '.join(empty[:3])}")
    return tensors


def _parts(tensors: list[TensorHeader]) -> list[Part]:
    by_part: dict[str, list[TensorHeader]] = defaultdict(list)
    for tensor in tensors:
        by_part[_part_of(tensor.name)].append(tensor)
    order = [*dict.fromkeys(name for name, _ in _PARTS), "other"]
    return [
        Part(
            name=name,
            tensors=len(by_part[name]),
            parameters=sum(tensor.parameters for tensor in by_part[name]),
            bytes=sum(tensor.bytes for tensor in by_part[name]),
            dtypes=tuple(dtype for dtype, _ in Counter(tensor.dtype for tensor in by_part[name]).most_common()),
        )
        for name in order
        if by_part[name]
    ]


def _part_of(name: str) -> str:
    plain = name.removeprefix("base_model.model.")
    inner = plain.removeprefix("model.")
    for part, beginnings in _PARTS:
        if part == "adapter" and any(mark in plain for mark in beginnings):
            return part
        if plain.startswith(beginnings) and part == "language model":
            return part
        if part != "adapter" and inner.startswith(beginnings) and part != "language model":
            return part
    return "other"


def _check_index(directory: Path, tensors: list[TensorHeader], found: Inspection) -> None:
    """Every file and tensor of an index must be there."""
    for index in directory.glob("*.index.json"):
        content = _json(index, found).get("weight_map")
        if not isinstance(content, dict):
            found.problems.append(f"{index.name} is damaged: it must hold a 'weight_map'")
            continue
        if gone := sorted({str(file) for file in content.values() if not (directory / str(file)).is_file()}):
            found.problems.append(f"{index.name} names {len(gone)} files that are not there: {', '.join(gone[:3])}")
        elif gone := sorted(content.keys() - {tensor.name for tensor in tensors}):
            found.problems.append(f"{index.name} names {len(gone)} tensors that no file holds: {', '.join(gone[:3])}")


def _json(file: Path, found: Inspection) -> Json:
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        found.problems.append(f"{file.name} cannot be read: {error}")
        return {}
    if not isinstance(content, dict):
        found.problems.append(f"{file.name} is damaged: it must hold one JSON object")
        return {}
    return content
