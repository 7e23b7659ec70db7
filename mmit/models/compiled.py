"""Layers of a language model compiled by torch, for training; all but the last, which runs at chosen positions only.

Compiled is what a layer computes around its attention: packed attention splits a row by the lengths of its samples,
which differ from row to row, and stays as it is. Lengths are symbols of the compiled code, so that it serves them all.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial, wraps
from importlib.util import find_spec
from os import environ
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from mmit.errors import ConfigError
from mmit.models.attention import PACKED, packed_attention
from mmit.models.language_models import has_experts
from mmit.models.last_layer import layers_of

COMPILED_WITH = (PACKED, "sdpa", "eager")
"""The attentions of layers that can be compiled."""


def compile_layers(language_model: PreTrainedModel, *, attention: str) -> None:
    """Let every layer but the last run compiled where gradients are taken; parameters keep their names.

    Compiling itself happens in the first forward and backward pass. Raises ConfigError where it would not work.
    """
    if reason := why_not_compiled(language_model, attention=attention) or why_no_compiler(language_model.device):
        raise ConfigError(f"compile: {reason}; set it to false")
    AttentionInterface.register(PACKED, torch.compiler.disable(packed_attention))
    for layer in layers_of(language_model)[:-1]:
        assert isinstance(layer, GradientCheckpointingLayer), "see why_not_compiled"
        layer.__dict__["forward"] = _compiled(layer)


def why_not_compiled(language_model: PreTrainedModel, *, attention: str) -> str:
    """Why the layers of a model are not compiled; empty where they can be."""
    name = type(language_model).__name__
    layers = layers_of(language_model)
    if attention not in COMPILED_WITH:
        return f"layers with the attention '{attention}' are not compiled"
    if has_experts(language_model):
        return f"{name} is a mixture of experts, whose layers run other code for every token"
    if any(isinstance(module, nn.Dropout) and module.p for layer in layers[:-1] for module in layer.modules()):
        return "its layers have dropout, for which compiled code draws other random numbers"
    if not layers or not all(isinstance(layer, GradientCheckpointingLayer) for layer in layers):
        return f"{name} has no layers that can be compiled one by one"
    return ""


def why_no_compiler(device: torch.device) -> str:
    """Why torch cannot compile for a device on this machine; empty where it can."""
    if device.type == "cpu":
        compiler = environ.get("CXX", "g++")
        return "" if shutil.which(compiler) else f"torch compiles for the CPU with {compiler}, which is not installed"
    return "" if find_spec("triton") else "torch compiles for GPUs with the package triton, which is not installed"


def _compiled(layer: GradientCheckpointingLayer) -> Callable[..., Any]:
    """The forward of ``layer``, compiled while gradients are taken, and recomputed where the layer is asked to."""
    # What transformers has wrapped: its recomputation has to stay outside of what is compiled.
    plain = MethodType(vars(type(layer).forward)["__wrapped__"], layer)
    compiled = torch.compile(plain, dynamic=True)

    @wraps(type(layer).forward)
    def forward(states: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the layer's own signature
        # a single position would be compiled for itself: torch takes sizes of 1 for constants
        run = compiled if torch.is_grad_enabled() and states.shape[1] > 1 else plain
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dtype == torch.int64:
            kwargs["attention_mask"] = mask = mask.clone()  # a view is looked at with what it is a view of
            torch._dynamo.decorators.mark_unbacked(mask, 2)  # and so would rows of one sample
        if layer.gradient_checkpointing and layer.training:
            return cast("Any", layer)._gradient_checkpointing_func(partial(run, **kwargs), states, *args)
        return run(states, *args, **kwargs)

    return forward
