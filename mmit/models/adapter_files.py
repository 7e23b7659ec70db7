"""A directory with an adapter: written as peft writes it, read strictly.

    adapter_config.json, adapter_model.safetensors    opened by peft, and by transformers where peft is installed
    base/                                             the model that the adapter stands beside, whole
    mmit.json, the tokenizer's and processor's files  as in base/

The directory itself has no ``config.json`` and no weights of the model: a program that knows nothing of adapters cannot
take it for the model without one.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmit.config import Lora
from mmit.encoding import Style
from mmit.errors import CheckpointError
from mmit.models.adapter_names import BASE, CONFIG, WEIGHTS, holds_adapter, is_adapter, split_adapter_name
from mmit.models.adapters import AdapterShape, adapted_layers, add_adapter, merge_adapter, shape_of
from mmit.models.formats import FORMATS, choose_target, read_json
from mmit.models.four_bits import pack, round_weights
from mmit.models.vlm import VisionLanguageModel

logger = logging.getLogger("mmit")

_PREFIX = "base_model.model."
# What a directory may say besides the shape of the adapter; anything else would change what it computes.
_SHAPE = ("r", "lora_alpha", "use_dora", "use_rslora", "target_modules")
_NO_MATTER = ("peft_type", "peft_version", "task_type", "auto_mapping", "revision", "lora_dropout", "inference_mode")
_NOT_COPIED = ("config.json", "generation_config.json", "open_clip_config.json")


def write_adapter(
    model: VisionLanguageModel, tensors: Mapping[str, Tensor], directory: Path, *, place: Path, style: Style
) -> None:
    """Write the adapter of a model into ``directory``, whose ``base/`` is written.

    tensors: those of the adapter by their names in memory. place: where the directory will be, by which peft finds the
    base. style: how text around images is tokenized.
    """
    module_name = choose_target(model, style).writer.module_name
    stored: dict[str, Tensor] = {}
    for name in filter(is_adapter, dict(model.named_parameters())):
        module, own = split_adapter_name(name)
        stored[f"{_PREFIX}{module_name(module)}.{own}"] = tensors[name].detach().cpu().contiguous()
    save_file(stored, directory / WEIGHTS, metadata={"format": "pt"})
    shape = current_shape(model)
    config = LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,
        use_dora=shape.dora,
        use_rslora=shape.rslora,
        target_modules=sorted(map(module_name, shape.modules)),
        base_model_name_or_path=str((place / BASE).absolute()),
        inference_mode=True,
    )
    config.save_pretrained(str(directory))
    for file in (directory / BASE).iterdir():
        if file.is_dir():
            shutil.copytree(file, directory / file.name)
        elif file.suffix != ".safetensors" and not file.name.endswith(".index.json") and file.name not in _NOT_COPIED:
            shutil.copy(file, directory / file.name)
    own_file = directory / "mmit.json"
    described = asdict(shape) | {"modules": len(shape.modules)}
    content = read_json(own_file) | {"adapter": described}
    own_file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_adapter(model: VisionLanguageModel, directory: Path, *, dropout: float = 0.0) -> None:
    """Put the adapter of a directory into a model, in place. Raises CheckpointError where it does not fit."""
    stored = _tensors(directory)
    names = _in_memory(model)
    shape = _shape(model, directory, stored)
    add_adapter(model, shape, dropout=dropout, seed=0)
    wanted: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            module, own = split_adapter_name(name)
            wanted[f"{module}.{own}"] = parameter
    found = {f"{names[module]}.{own}": tensor for (module, own), tensor in stored.items()}
    wrong = sorted(found.keys() ^ wanted.keys()) or [
        name for name in wanted if found[name].shape != wanted[name].shape or not bool(found[name].isfinite().all())
    ]
    if wrong:
        raise CheckpointError(
            f"{directory / WEIGHTS} does not fit {CONFIG}: {len(wrong)} tensors are missing, unexpected, of another "
            f"shape or not finite ({', '.join(wrong[:3])})"
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(found[name])


def begin_adapter(model: VisionLanguageModel, lora: Lora | None, directory: Path | None, *, seed: int) -> None:
    """Give a model, loaded without its adapter, the one that a stage trains.

    directory: where the model came from. An adapter there goes on where the stage asks for the same one; else it is
    merged into the weights, and the stage starts a fresh one, or none. Raises ConfigError or CheckpointError.
    """
    wanted = None if lora is None else shape_of(model, lora)
    stored = directory if directory is not None and holds_adapter(directory) else None
    goes_on = stored is not None and wanted == stored_shape(model, stored)
    if stored is not None and not goes_on:
        read_adapter(model, stored)
        merge_adapter(model)
        logger.info("the adapter of %s is merged into the weights: this stage asks for another one", stored)
    if lora is None or wanted is None:
        return
    if lora.quantize == "nf4":
        round_weights(model.language_model)  # before the adapter, which may start from the lengths of their rows
    if stored is not None and goes_on:
        read_adapter(model, stored, dropout=lora.dropout)
        logger.info("the adapter of %s goes on", stored)
    else:
        add_adapter(model, wanted, dropout=lora.dropout, seed=seed)
    if lora.quantize == "nf4":
        pack(model.language_model)


def stored_shape(model: VisionLanguageModel, directory: Path) -> AdapterShape:
    """The shape of the adapter in a directory, on this model. Raises CheckpointError for one that mmit cannot read."""
    return _shape(model, directory, _tensors(directory))


def current_shape(model: VisionLanguageModel) -> AdapterShape:
    """The shape of the adapter in a model."""
    config: Any = model.peft_config
    lora = config["default"]
    return AdapterShape(
        rank=lora.r,
        alpha=lora.lora_alpha,
        dora=lora.use_dora,
        rslora=lora.use_rslora,
        modules=frozenset(adapted_layers(model)),
    )


def _shape(model: VisionLanguageModel, directory: Path, stored: Mapping[tuple[str, str], Tensor]) -> AdapterShape:
    config = read_json(directory / CONFIG)
    plain = LoraConfig().to_dict()
    known = (*_SHAPE, *_NO_MATTER, "base_model_name_or_path")
    others = [key for key, value in config.items() if key not in known and value != plain.get(key) and value]
    if config.get("peft_type") != "LORA" or others:
        what = ", ".join(others) or f"the type {config.get('peft_type')}"
        raise CheckpointError(f"{directory / CONFIG} has {what}, which mmit does not read; merge it with peft")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not (isinstance(rank, int) and isinstance(alpha, int) and min(rank, alpha) > 0):
        raise CheckpointError(
            f"{directory / CONFIG} must say r and lora_alpha as whole numbers above 0, not {rank!r} and {alpha!r}"
        )
    names = _in_memory(model)
    strange = sorted({module for module, _ in stored} - names.keys())
    if strange:
        raise CheckpointError(f"{directory / WEIGHTS} has an adapter for {strange[0]}, which the model does not have")
    return AdapterShape(
        rank=rank,
        alpha=alpha,
        dora=bool(config.get("use_dora")),
        rslora=bool(config.get("use_rslora")),
        modules=frozenset(names[module] for module, _ in stored),
    )


def _tensors(directory: Path) -> dict[tuple[str, str], Tensor]:
    """The stored tensors by the layer's name on disk and their own name."""
    try:
        stored = load_file(directory / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory / WEIGHTS} cannot be read: {error}") from error
    return {split_adapter_name(name.removeprefix(_PREFIX)): tensor for name, tensor in stored.items()}


def _in_memory(model: VisionLanguageModel) -> dict[str, str]:
    """Name of a layer on disk, in any format -> in memory."""
    spellings = [str, *(form.write.module_name for form in FORMATS if form.write)]
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {spelling(name): name for spelling in spellings for name in linear}
