"""Low-rank adapters (LoRA, arXiv 2106.09685) in a model: put beside chosen linear layers, or merged into them.

    W x   becomes   W x + scale * B A x,    scale = alpha / rank (rsLoRA, arXiv 2312.03732: alpha / sqrt(rank))

DoRA (arXiv 2402.09353) also rescales each row of W + scale * B A to a trained length. peft does it in place, so that
modules and parameters keep their names (see ``adapter_names``). The only module that imports peft.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as AdaptedLinear
from torch import Tensor, nn

from mmit.config import Lora
from mmit.errors import ConfigError
from mmit.models.layout import hub_form
from mmit.models.rules import PARTS
from mmit.models.vlm import VisionLanguageModel

_ADAPTER = "default"
_TOWER = "vision_tower.model."


@dataclass(frozen=True, kw_only=True)
class AdapterShape:
    """What two adapters must share for the weights of one to go on in the other.

    modules: names of the adapted layers in memory.
    """

    rank: int
    alpha: int
    dora: bool
    rslora: bool
    modules: frozenset[str]


def shape_of(model: VisionLanguageModel, lora: Lora) -> AdapterShape:
    """The adapter that a run file asks for, on this model. Raises ConfigError for targets that cannot be adapted."""
    modules = frozenset(target_modules(model, lora.targets))
    return AdapterShape(rank=lora.rank, alpha=lora.alpha, dora=lora.dora, rslora=lora.rslora, modules=modules)


def target_modules(model: VisionLanguageModel, targets: Iterable[str]) -> list[str]:
    """Names of the linear layers that ``targets`` mean: part names, or regular expressions over module names.

    ``language_model`` is every linear layer of it but the head. Raises ConfigError for a target that matches nothing,
    or the head, or a tower that is saved under other names than it has in memory.
    """
    head = model.language_model.get_output_embeddings()
    # A subclass without a forward of its own use (torch's attention reads the weight itself) would not be reached.
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    }
    chosen: dict[str, nn.Linear] = {}
    for target in targets:
        prefix = PARTS.get(target)
        found = {
            name: layer
            for name, layer in linear.items()
            if (name.startswith(prefix) and layer is not head if prefix else re.search(target, name))
        }
        if not found:
            parts = ", ".join(PARTS)
            raise ConfigError(f"lora.targets: '{target}' matches no linear layer (part names are {parts})")
        if any(layer is head for layer in found.values()):
            raise ConfigError(
                f"lora.targets: '{target}' matches the head, which has no adapter; leave it out, and train it in full "
                "with a rule of its own if it is to be trained"
            )
        chosen |= found
    _check_tower(model, chosen)
    return list(chosen)


def add_adapter(model: VisionLanguageModel, shape: AdapterShape, *, dropout: float, seed: int) -> None:
    """Put a fresh adapter into a model, in place; it changes no output until it is trained, and depends on ``seed``."""
    config = LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,
        lora_dropout=dropout,
        use_dora=shape.dora,
        use_rslora=shape.rslora,
        target_modules=sorted(shape.modules),
    )
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    with torch.random.fork_rng(devices=[]), model.placement.born():  # DoRA starts from the lengths of whole rows
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    assert adapted_layers(model).keys() == shape.modules, "peft adapts the layers it is given"
    for layer in adapted_layers(model).values():
        for parameter in _own_parameters(layer):
            parameter.data = parameter.data.to(dtype)
    model.eval()


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The layers with an adapter, by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


@torch.no_grad()
def merge_adapter(model: VisionLanguageModel) -> None:
    """Add the adapter to the weights it stands beside, in fp32 and rounded once, and take it out of the model."""
    for name, layer in adapted_layers(model).items():
        base = layer.get_base_layer()
        assert isinstance(base, nn.Linear), "target_modules names linear layers"
        with model.placement.whole([base.weight], write=True):
            base.weight.copy_(merged_weight(layer, base.weight))
        model.set_submodule(name, base)
    del model.peft_config


def merged_weight(layer: AdaptedLinear, weight: Tensor) -> Tensor:
    """The weight (out, in) of an adapted layer with its adapter added, in fp32."""
    down = layer.get_parameter(f"lora_A.{_ADAPTER}.weight").float()  # (rank, in)
    up = layer.get_parameter(f"lora_B.{_ADAPTER}.weight").float()  # (out, rank)
    merged = weight.float() + layer.scaling[_ADAPTER] * (up @ down)
    if layer.use_dora[_ADAPTER]:
        length = layer.get_parameter(f"lora_magnitude_vector.{_ADAPTER}.weight").float()  # (out,)
        merged *= (length / merged.norm(dim=1)).unsqueeze(1)
    return merged


def _own_parameters(layer: AdaptedLinear) -> Sequence[nn.Parameter]:
    held = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
    return [parameter for modules in held for parameter in modules.parameters()]


def _check_tower(model: VisionLanguageModel, names: Iterable[str]) -> None:
    form = hub_form(model.vision_tower)
    inside = [f"{name.removeprefix(_TOWER)}.weight" for name in names if name.startswith(_TOWER)]
    if form is not None and any(form.on_disk(name) != (name,) for name in inside):
        raise ConfigError(
            "lora.targets: the layers of this tower are stored under other names than it has in memory; leave "
            "vision_tower out, or take a CLIP or SigLIP of type transformers, which a tower of open_clip becomes when "
            "the model is saved once and opened as model.path"
        )
