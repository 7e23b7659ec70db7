"""Floating-point operations of a training step, counted from shapes: what share of the work the vision tower does.

A multiplication with an addition is two operations. For a language model of N parameters in its layers, L layers with
attention of width w, and a head of h x V:

    layers      c N T        c = 6 where it trains (forward, gradients of inputs and of weights), 4 where it is frozen
    attention   6 L w t^2    for a sample of t tokens; it looks backwards, which halves it
    head        c h V S      at the S labelled positions only

A frozen tower runs forward alone, one that trains counts three times. Connectors are left out: a few percent of the
tower. Of experts those count that a token is sent to; what is computed anew in a backward pass counts once, and the
tokens that samples share (shared_prefix.py) count for each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mmit.config import ComposedModel, WholeModel
from mmit.errors import ConfigError
from mmit.hub import revision_of
from mmit.images import ImageSpec
from mmit.models.adapter_names import is_adapter
from mmit.models.load import open_section
from mmit.models.rules import training_rule


@dataclass(frozen=True, kw_only=True)
class LanguageModelShape:
    """What the work of a language model depends on. trains: whether some of it does."""

    parameters: int
    layers: int
    attention_width: int
    head: int
    trains: bool

    def flops(self, *, tokens: int, squares: int, labels: int) -> int:
        """Operations of a forward and a backward pass over samples of ``tokens`` in all.

        squares: the sum of the squares of their lengths. labels: trained tokens.
        """
        c = 6 if self.trains else 4
        return c * self.parameters * tokens + 6 * self.layers * self.attention_width * squares + c * self.head * labels


def language_model_shape(section: ComposedModel | WholeModel, rules: Mapping[str, float]) -> LanguageModelShape:
    """The shape of a run file's language model, without its weights, under the rules of what trains.

    Raises ConfigError and CheckpointError.
    """
    config: Any
    if isinstance(section, ComposedModel):
        path = section.language_model.path
        try:
            config = AutoConfig.from_pretrained(path, revision=revision_of(path)).get_text_config()
        except (OSError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise ConfigError(f"model.language_model.path: {path} cannot be read: {first}") from error
    else:
        contents, form = open_section(section)
        fields = dict(form.text_config(contents))
        config = AutoConfig.for_model(fields.pop("model_type", "llama"), **fields)
    model = _without_weights(config)
    alone = nn.Module()
    alone.language_model = model
    return _shape_of(model, trains=training_rule(rules, alone) is not None)


def shape_of(language_model: PreTrainedModel) -> LanguageModelShape:
    """The shape of a language model that is there, whole or in pieces; adapters beside its weights are left out."""
    own = [name for name, p in language_model.named_parameters() if p.requires_grad and not is_adapter(name)]
    return _shape_of(_without_weights(language_model.config), trains=bool(own))


def _without_weights(config: Any) -> Any:  # noqa: ANN401  (one of transformers' many)
    maker: Any = AutoModelForCausalLM
    with torch.device("meta"):
        return maker.from_config(config)


def _shape_of(model: Any, *, trains: bool) -> LanguageModelShape:  # noqa: ANN401  (one of transformers' many)
    config = model.config
    table = model.get_input_embeddings().weight
    heads = getattr(config, "num_attention_heads", 0)  # none in a model without attention
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    chosen = getattr(config, "num_experts_per_tok", None) or experts
    weights = {name: p.numel() for name, p in model.base_model.named_parameters() if p.ndim > 1 and p is not table}
    idle = sum(count for name, count in weights.items() if ".experts." in name) * (experts - chosen) // experts
    return LanguageModelShape(
        parameters=sum(weights.values()) - idle,
        layers=config.num_hidden_layers,
        attention_width=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads) if heads else 0,
        head=table.numel(),
        trains=trains,
    )


def tower_flops(tower: nn.Module, spec: ImageSpec) -> int:
    """Operations of a tower's forward pass over one tile, counted on shapes alone."""
    tensors = [*tower.named_parameters(), *tower.named_buffers()]
    # under ZeRO-3 a parameter is empty between uses; its own shape is kept in ds_shape
    shapes = {
        name: torch.empty(getattr(tensor, "ds_shape", tensor.shape), dtype=tensor.dtype, device="meta")
        for name, tensor in tensors
    }
    tile = torch.zeros((1, 3, *spec.canvas), device="meta", dtype=next(tower.parameters()).dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        functional_call(tower, shapes, (tile,))
    return int(counter.get_total_flops())
