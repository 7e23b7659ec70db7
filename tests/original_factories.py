"""Directories as LLaVA's original code leaves them, made tensor by tensor from a tiny model, without mmit's writer."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from model_factories import tiny_model_section
from safetensors.torch import load_file
from torch import Tensor

from mmit.config import ComposedModel, WholeModel
from mmit.models import LoadedModel, build_model, load_model, save_model

Tensors = dict[str, Tensor]

PROJECTOR = {"linear_1": "model.mm_projector.0", "linear_2": "model.mm_projector.2"}


def original_names(hub: Tensors) -> Tensors:
    """Tensors of a LLaVA model of the hub under the names of the original code; the tower is left out."""
    named: Tensors = {}
    for name, tensor in hub.items():
        part, _, rest = name.partition(".")
        if part == "language_model":
            named[rest] = tensor
        elif part == "multi_modal_projector":
            layer, _, kind = rest.partition(".")
            named[f"{PROJECTOR[layer]}.{kind}"] = tensor
        elif part == "image_newline":
            named["model.image_newline"] = tensor
    return named


def original_config(llm: Path, tower: Path | str, **changes: Any) -> dict[str, Any]:
    """The language model's config.json with the fields of the original code."""
    config = json.loads((llm / "config.json").read_text())
    return {
        **config,
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "image_aspect_ratio": "pad",
        "mm_hidden_size": 48,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": str(tower),
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
        **changes,
    }


def copy_tokenizer(llm: Path, directory: Path) -> None:
    """Lay the language model's tokenizer beside the weights."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (llm / name).is_file():
            shutil.copyfile(llm / name, directory / name)


def write_original(directory: Path, config: dict[str, Any], files: dict[str, Tensors], llm: Path) -> Path:
    """A directory of pickled files; several files of a whole model get an index."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    copy_tokenizer(llm, directory)
    for name, tensors in files.items():
        torch.save(tensors, directory / name)
    shards = [name for name in files if name.startswith("pytorch_model-")]
    if shards:
        index = {"weight_map": {tensor: name for name in shards for tensor in files[name]}}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return directory


def hub_tensors(directory: Path) -> Tensors:
    """The tensors of a directory in the layout of the hub."""
    return load_file(directory / "model.safetensors")


@dataclass(frozen=True)
class Parts:
    """A model composed of an LLM, a tower and a projector; where they lie, and their tensors by the original names."""

    composed: LoadedModel
    llm: Path
    tower: Path
    language: Tensors
    projector: Tensors


def make_parts(folder: Path) -> Parts:
    """Tiny parts in ``folder``, and the model that they make."""
    section = ComposedModel.model_validate(tiny_model_section(folder))
    composed = build_model(section, dtype=torch.float32, seed=7)
    save_model(composed, None, folder / "hub", made_from={})
    named = original_names(hub_tensors(folder / "hub"))
    projector = {name: tensor for name, tensor in named.items() if "mm_projector" in name}
    llm = folder / "llama"
    return Parts(composed, llm, folder / "clip", load_file(llm / "model.safetensors"), projector)


def opened(path: Path, **section: Any) -> LoadedModel:
    """The model of a directory, with ``base``, ``tower`` or ``template``."""
    return load_model(WholeModel(path=str(path), **section), dtype=torch.float32)
