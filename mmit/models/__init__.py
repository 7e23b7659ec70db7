"""Models: encoders, connectors and language models composed, trained by rules, read and written.

    run file --build_model--> LoadedModel        directory --load_model--> LoadedModel --save_model--> directory

The names below are looked up when first used, since they need torch and transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmit.models.adapter_files import begin_adapter
    from mmit.models.adapter_names import base_directory, holds_adapter, partner
    from mmit.models.build import build_model
    from mmit.models.load import find_model_directory, load_model, load_weights
    from mmit.models.loaded import LoadedModel
    from mmit.models.merge import merge_directory
    from mmit.models.outline import Outline, read_outline
    from mmit.models.rules import NEW_TOKENS, TrainGroup
    from mmit.models.save import save_model
    from mmit.models.vlm import VisionLanguageModel
    from mmit.models.weight_files import Frozen, Weights

_WHERE = {
    "adapter_files": ("begin_adapter",),
    "adapter_names": ("base_directory", "holds_adapter", "partner"),
    "build": ("build_model",),
    "outline": ("Outline", "read_outline"),
    "load": ("find_model_directory", "load_model", "load_weights"),
    "loaded": ("LoadedModel",),
    "merge": ("merge_directory",),
    "rules": ("NEW_TOKENS", "TrainGroup"),
    "save": ("save_model",),
    "weight_files": ("Frozen", "Weights"),
    "vlm": ("VisionLanguageModel",),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "NEW_TOKENS",
    "Frozen",
    "LoadedModel",
    "Outline",
    "TrainGroup",
    "VisionLanguageModel",
    "Weights",
    "base_directory",
    "begin_adapter",
    "build_model",
    "find_model_directory",
    "holds_adapter",
    "load_model",
    "load_weights",
    "merge_directory",
    "partner",
    "read_outline",
    "save_model",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401  (PEP 562: the type is that of the name asked for)
    if name in _MODULE_OF:
        return getattr(import_module(f"mmit.models.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'mmit.models' has no attribute '{name}'")
