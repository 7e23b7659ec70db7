"""Adapters by their names: the parameters that they put into a model, and the files of a directory that holds one.

    language_model.model.layers.0.self_attn.q_proj.weight               without an adapter
    language_model.model.layers.0.self_attn.q_proj.base_layer.weight    the same parameter with one
    language_model.model.layers.0.self_attn.q_proj.lora_A.default.weight        the adapter's own

Everything that speaks of parameters by name (rules, files) leaves the level out: a rule and a tensor on disk have the
same name with and without an adapter.

    DIR/adapter_config.json, adapter_model.safetensors      the adapter, as peft writes it
    DIR/base/                                               a whole model directory: everything but the adapter
"""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import nn

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE = "base"

_OWN = ".lora_"
_LEVEL = ".base_layer."
_NAME = ".default"
# Where the parts are in the LLaVA classes of transformers 5, which peft's own files follow.
_IN_TRANSFORMERS = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head", "lm_head"),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("vision_tower.model.", "model.vision_tower."),
)


def is_adapter(name: str) -> bool:
    """True for a parameter that an adapter brought along."""
    return _OWN in name


def plain_name(name: str) -> str:
    """The name of a parameter as it is without an adapter."""
    return name.replace(_LEVEL, ".")


def split_adapter_name(name: str) -> tuple[str, str]:
    """A parameter of an adapter as the layer it belongs to, and its own name as peft stores it: ``lora_A.weight``."""
    module, _, own = name.partition(_OWN)
    return module, (_OWN + own).removeprefix(".").replace(_NAME, "", 1)


def partner(name: str) -> str:
    """The parameter that gets a gradient where ``lora_A`` cannot: ``lora_B`` starts at 0, and so does A's gradient."""
    return name.replace(".lora_A.", ".lora_B.")


def transformers_name(module: str) -> str:
    """The name of a module in the LLaVA classes of transformers."""
    for ours, theirs in _IN_TRANSFORMERS:
        if module.startswith(ours):
            return theirs + module.removeprefix(ours)
    return module


def has_adapter(model: nn.Module) -> bool:
    """True for a model with an adapter in it."""
    return any(is_adapter(name) for name, _ in model.named_parameters())


def holds_adapter(directory: Path) -> bool:
    """True for a model directory with an adapter that is not merged, as mmit writes it."""
    return (directory / CONFIG).is_file() and (directory / BASE / "config.json").is_file()


def base_directory(directory: Path) -> Path:
    """Where the weights are that an adapter stands beside: the directory itself where it holds none."""
    return directory / BASE if holds_adapter(directory) else directory


def adapts_tower(directory: Path) -> bool:
    """True where the adapter of a model directory has layers in the vision tower."""
    with safe_open(directory / WEIGHTS, framework="pt") as stored:
        return any("vision_tower." in name for name in stored.keys())  # noqa: SIM118  (no mapping)
