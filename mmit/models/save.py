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
from collections.abc import Collection, Mapping
from dataclasses import dataclass
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
from mmit.models.layout import disk_names, hub_form, tensors_of, to_disk
from mmit.models.loaded import FORMAT, LoadedModel
from mmit.models.stored import INDEX

_FROZEN, _TRAINED = "frozen", "trained"

SHARD_BYTES = 5 * 10**9
"""Weights beyond this size are split over several files."""

SENTENCEPIECE = "tokenizer.model"
"""A Llama-type tokenizer in its first form."""

PACKAGES = ("torch", "transformers", "open_clip_torch", "timm", "deepspeed", "tokenizers", "safetensors")


@dataclass(frozen=True)
class Frozen:
    """Weights that stay the same from one writing to the next: linked to the files in ``written``, where that is."""

    written: Path | None


def save_model(
    loaded: LoadedModel,
    state: Mapping[str, Tensor] | None,
    directory: Path | str,
    *,
    made_from: Mapping[str, Any],
    to: Target | None = None,
    place: Path | None = None,
    frozen: Frozen | None = None,
) -> None:
    """Write the model into ``directory``, replacing what is there.

    state: all tensors by their names in memory, where they are not in the model itself (ZeRO); tied names may occur
    twice. made_from: free facts for ``mmit.json`` (run, stage, base models). to: the format; None for the one that
    ``choose_target`` takes. place: where the directory will stand in the end; None for where it is written. frozen: of
    a model with an adapter, the weights that do not train go into files of their own. Raises
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
        stored = _write(loaded, state, content, target, frozen=frozen if adapted else None)
        if target.writer.describes:
            own = _own_description(loaded, made_from)
            write_json(content / "mmit.json", own | _layout(target))
        target.writer.more(loaded, stored, content, place)
        if adapted:
            from mmit.models.adapter_files import write_adapter

            write_adapter(loaded.model, state, fresh, place=place, style=loaded.style)
        take_place(fresh, directory)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot write the model to {directory}: {reason}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _write(
    loaded: LoadedModel,
    state: Mapping[str, Tensor] | None,
    directory: Path,
    target: Target,
    *,
    frozen: Frozen | None,
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
    named = {on_disk: tensor for name, tensor in stored.items() if (on_disk := writer.disk_name(name)) is not None}
    if frozen is None:
        _write_weights({"model": named}, directory, Frozen(None))
    else:
        trained = [plain_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad]
        of_trained = {
            writer.disk_name(name) for some in disk_names(model.vision_tower, trained).values() for name in some
        }
        _write_weights(_split(named, of_trained), directory, frozen)
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


def _split(tensors: Mapping[str, Tensor], trained: Collection[str | None]) -> dict[str, dict[str, Tensor]]:
    return {
        file: {name: tensor for name, tensor in tensors.items() if (name in trained) == (file == _TRAINED)}
        for file in (_FROZEN, _TRAINED)
    }


def _write_weights(files: Mapping[str, dict[str, Tensor]], directory: Path, frozen: Frozen) -> None:
    """Write tensors by the name of their file, each split where it is too large, and an index of more than one."""
    place: dict[str, str] = {}
    size = 0
    for name, tensors in files.items():
        split = split_torch_state_dict_into_shards(
            tensors, max_shard_size=SHARD_BYTES, filename_pattern=f"{name}{{suffix}}.safetensors"
        )
        for file, names in split.filename_to_tensors.items():
            if name != _FROZEN or not _linked(frozen, directory / file):
                save_file({key: tensors[key] for key in names}, directory / file, metadata={"format": "pt"})
        place |= split.tensor_to_filename
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if len(set(place.values())) > 1 or _FROZEN in files:
        write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": place})


def _linked(frozen: Frozen, file: Path) -> bool:
    """Let ``file`` be one more name of the file that was written before; False where there is none, or no links."""
    try:
        if frozen.written is None:
            return False
        os.link(frozen.written / file.name, file)
    except OSError:
        return False
    return True


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
