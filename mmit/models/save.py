"""Write a model as one directory that transformers, vLLM and mmit open: all of it, or nothing.

A model with an adapter becomes a directory of peft's, with the whole model that the adapter stands beside in it.

Everything goes into a temporary directory beside the target, which takes its place at the end. A model that
transformers' LLaVA class cannot hold is written with the same names under mmit's own ``model_type``, and
``mmit.json`` says why.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mmit.errors import CheckpointError
from mmit.models.adapter_names import BASE, has_adapter, plain_name
from mmit.models.encoders import describe_towers
from mmit.models.formats import Target, choose_target, write_json
from mmit.models.formats.own import OWN
from mmit.models.formats.parts import INSTRUCTION_TOKENIZER, connector_inside
from mmit.models.four_bits import unpacked
from mmit.models.layout import hub_form, tensors_of, to_disk
from mmit.models.loaded import FORMAT, LoadedModel
from mmit.models.stored import INDEX

SHARD_BYTES = 5 * 10**9
"""Weights beyond this size are split over several files."""

SENTENCEPIECE = "tokenizer.model"
"""A Llama-type tokenizer in its first form."""

PACKAGES = ("torch", "transformers", "open_clip_torch", "timm", "deepspeed", "tokenizers", "safetensors")


def save_model(
    loaded: LoadedModel,
    state: Mapping[str, Tensor] | None,
    directory: Path | str,
    *,
    made_from: Mapping[str, Any],
    to: Target | None = None,
    place: Path | None = None,
) -> None:
    """Write the model into ``directory``, replacing what is there.

    state: all tensors by their names in memory, where they are not in the model itself (ZeRO); tied names may occur
    twice. made_from: free facts for ``mmit.json`` (run, stage, base models). to: the format; None for the one that
    ``choose_target`` takes. place: where the directory will stand in the end; None for where it is written. Raises
    CheckpointError where the disk refuses; then nothing has changed.
    """
    directory = Path(directory)
    fresh = directory.with_name(f".{directory.name}.writing")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        adapted = has_adapter(loaded.model)
        content = fresh / BASE if adapted else fresh
        content.mkdir(parents=True, exist_ok=True)
        place = place or directory
        target = to or choose_target(loaded.model, loaded.style)
        stored = _write(loaded, state, content, target)
        if target.writer.describes:
            own = _own_description(loaded, made_from)
            write_json(content / "mmit.json", own | _layout(target))
        target.writer.more(loaded, stored, content, place)
        if adapted:
            from mmit.models.adapter_files import write_adapter

            write_adapter(loaded.model, state, fresh, place=place, style=loaded.style)
        take_place(fresh, directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot write the model to {directory}: {reason}") from error


def _write(
    loaded: LoadedModel, state: Mapping[str, Tensor] | None, directory: Path, target: Target
) -> dict[str, Tensor]:
    """Write weights and settings; returns the tensors under their hub names."""
    model, writer = loaded.model, target.writer
    tensors = dict(tensors_of(model))
    if state is not None:
        gathered = {plain_name(name): tensor for name, tensor in state.items()}
        tensors = {name: gathered[name] for name in tensors}
    tensors |= unpacked(model)
    dtype = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    stored = to_disk(model.vision_tower, {name: t.detach().cpu() for name, t in tensors.items()})
    named = {writer.disk_name(name): tensor for name, tensor in stored.items()}
    _write_weights({name: tensor for name, tensor in named.items() if name is not None}, directory)
    write_json(directory / "config.json", writer.config(loaded, dtype))
    for name, content in writer.files(loaded).items():
        write_json(directory / name, content)
    _write_tokenizer(loaded, directory, processor_class=writer.processor_class)
    write_json(directory / "generation_config.json", _generation_config(loaded))
    if loaded.instructions is not None and writer.describes:
        loaded.instructions.tokenizer.save_pretrained(directory / INSTRUCTION_TOKENIZER)
    return stored


def _layout(target: Target) -> dict[str, Any]:
    """Which format this is, and why transformers has no class for a model that is in mmit's own."""
    refused = {"not_llava_because": "; ".join(target.refused)} if target.refused and target.name == OWN.name else {}
    return {"layout": target.name} | refused


def _write_weights(tensors: dict[str, Tensor], directory: Path) -> None:
    split = split_torch_state_dict_into_shards(
        tensors, max_shard_size=SHARD_BYTES, filename_pattern="model{suffix}.safetensors"
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, directory / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(directory / INDEX, index)


def _write_tokenizer(loaded: LoadedModel, directory: Path, *, processor_class: str) -> None:
    tokenizer = loaded.tokenizer
    tokenizer.save_pretrained(directory)
    pieces = Path(tokenizer.name_or_path) / SENTENCEPIECE
    if pieces.is_file():
        # what LLaVA's original code, llama.cpp and slow tokenizers read
        shutil.copyfile(pieces, directory / SENTENCEPIECE)
    (directory / "chat_template.jinja").write_text(loaded.template.jinja, encoding="utf-8")
    file = directory / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("chat_template", None)
    config.pop("processor_class", None)
    if processor_class:
        config["processor_class"] = processor_class
    if str(config.get("tokenizer_class", "")).startswith("LlamaTokenizer"):
        # transformers 5 does not save it, and 4 takes True where it is not said: other ids after every </s>
        config["legacy"] = bool(getattr(tokenizer, "legacy", False))
    write_json(file, config)


def _generation_config(loaded: LoadedModel) -> dict[str, Any]:
    config: dict[str, Any] = {"eos_token_id": list(loaded.template.stop_ids), "pad_token_id": loaded.pad_id}
    if loaded.tokenizer.bos_token_id is not None:
        config["bos_token_id"] = loaded.tokenizer.bos_token_id
    return config


def _own_description(loaded: LoadedModel, made_from: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "template": loaded.template.name,
        "text_style": loaded.style,
        "images": loaded.model.spec.to_dict(),
        **({} if loaded.model.vocabulary is None else {"vocabulary": loaded.model.vocabulary}),
        **({"new_tokens": list(loaded.model.new_ids)} if loaded.model.new_ids else {}),
        "encoder": dict(loaded.encoder),
        **_towers(loaded),
        "connector": connector_inside(loaded.connector),
        "made_from": dict(made_from),
        "packages": {"mmit": _version("mmit")} | {name: _version(name) for name in PACKAGES},
    }


def _towers(loaded: LoadedModel) -> dict[str, Any]:
    """The architecture of encoders that no class of transformers holds, from which they are built again offline."""
    tower = loaded.model.vision_tower
    return {} if hub_form(tower) is not None else {"towers": describe_towers(tower, loaded.encoder)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def take_place(fresh: Path, directory: Path) -> None:
    """Put ``fresh`` where ``directory`` is; at no moment is there half a model under that name."""
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        os.rename(directory, old)
    os.rename(fresh, directory)
    shutil.rmtree(old, ignore_errors=True)
