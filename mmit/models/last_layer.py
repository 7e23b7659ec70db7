"""The last layer's matrices at labelled positions only: nothing else reads what they make.

The head reads the labelled positions, and above the keys and values of the last layer no position looks at another:
the feed-forward part, the queries and the output of the attention are wanted where a label is, and nowhere else. Which
submodules that holds for is found out by trial, for any language model; one that fails it runs on all positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from mmit.errors import ConfigError
from mmit.models.language_models import has_experts, token_table
from mmit.models.placement import Placement


@dataclass(frozen=True)
class _Places:
    """Where submodules run: ``places`` (S,) of rows * length positions; the output elsewhere is ``fill``."""

    places: Tensor
    rows: int
    length: int
    fill: float = 0.0


class LastLayer:
    """Submodules of a language model that run at chosen positions only while ``only`` is in force."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = tuple(modules)
        self._at: _Places | None = None
        self._hooks = [
            hook
            for module in modules
            for hook in (module.register_forward_pre_hook(self._gather), module.register_forward_hook(self._scatter))
        ]

    def only(self, places: Tensor, shape: torch.Size) -> AbstractContextManager[None]:
        """While in force, run at ``places`` (S,) of the flattened positions ``shape`` (B, T); outputs elsewhere are 0.

        Without a place, the first position runs: a module runs in every forward, whatever the batch holds.
        """
        places = places if len(places) else places.new_zeros(1)
        return self._during(_Places(places, *shape))

    def recomputing(self) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        """What ``torch.utils.checkpoint`` enters in the forward pass and while it runs a layer again (context_fn)."""
        return nullcontext(), self._during(self._at)

    def remove(self) -> None:
        """Run the submodules as they are."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def _during(self, at: _Places | None) -> Generator[None]:
        before, self._at = self._at, at
        try:
            yield
        finally:
            self._at = before

    def _gather(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        if self._at is None:
            return None
        return (inputs[0].flatten(0, 1).index_select(0, self._at.places)[None],)  # (1, S, D)

    def _scatter(self, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self._at is None:
            return None
        at = self._at
        everywhere = output.new_full((at.rows * at.length, output.shape[-1]), at.fill)
        return everywhere.index_copy(0, at.places, output[0]).view(at.rows, at.length, -1)  # (B, T, D)


class CannotRecompute(ConfigError):
    """A language model does not recompute the layers that it was asked to."""


def find_last_layer(language_model: PreTrainedModel, kept: Placement) -> LastLayer:
    """The submodules of the last layer that may run at labelled positions only; none where nothing can be shown.

    Mixtures of experts stay whole: their layers also count what every position asks for.
    """
    layers = layers_of(language_model)
    if has_experts(language_model) or not layers:
        return LastLayer(())
    return LastLayer(_free_to_choose(language_model, layers[-1], kept))


def recompute_layers(language_model: PreTrainedModel, last: LastLayer, *, every: int) -> None:
    """Let every ``every``-th layer, and the first, recompute its activations backwards. Raises ConfigError."""
    name = type(language_model).__name__
    if not language_model.supports_gradient_checkpointing:
        raise CannotRecompute(f"activation_checkpointing: {name} does not support it; set it to false")
    how = {"use_reentrant": False, "context_fn": last.recomputing}
    language_model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    layers = layers_of(language_model)
    if every > 1 and not (layers and all(isinstance(layer, GradientCheckpointingLayer) for layer in layers)):
        raise CannotRecompute(f"activation_checkpointing: {name} recomputes all of its layers or none; set it to true")
    for number, layer in enumerate(layers):
        if number % every:
            layer.__dict__["gradient_checkpointing"] = False


def layers_of(language_model: PreTrainedModel) -> list[nn.Module]:
    """The layers in their order; none where the model does not keep them in one list."""
    depth = getattr(language_model.config.get_text_config(), "num_hidden_layers", 0)
    lists = [module for module in language_model.base_model.modules() if isinstance(module, nn.ModuleList)]
    found = [list(module) for module in lists if len(module) == depth]
    return found[0] if len(found) == 1 else []


_LENGTH = 5
_PLACES = (0, 3)


@torch.no_grad()
def _free_to_choose(language_model: PreTrainedModel, layer: nn.Module, kept: Placement) -> list[nn.Module]:
    """The largest submodules whose output, NaN at all but some positions, leaves the last states there as they were."""
    table = token_table(language_model)
    states = torch.randn((1, _LENGTH, table.embedding_dim), generator=torch.Generator().manual_seed(0))
    states = states.to(language_model.device, language_model.dtype)
    at = _Places(torch.tensor(_PLACES, device=states.device), 1, _LENGTH, fill=float("nan"))

    def model_runs() -> Tensor:
        return language_model.base_model(inputs_embeds=states, use_cache=False).last_hidden_state

    with _noted(layer) as (call, candidates):
        whole = model_runs()

    def layer_runs() -> Tensor:
        output = layer(*call.args, **call.kwargs)
        return output if isinstance(output, Tensor) else output[0]

    def fits(modules: Sequence[nn.Module], run: Callable[[], Tensor], expected: Tensor) -> bool:
        trial = LastLayer(modules)
        with trial._during(at):
            difference = float((run() - expected)[0, at.places].abs().max())
        trial.remove()
        return difference <= 32 * torch.finfo(states.dtype).eps * float(expected.abs().max())  # a NaN is not

    output = layer_runs()
    found: list[nn.Module] = []

    def look_into(module: nn.Module) -> None:
        for child in module.children():
            has_matrix = any(len(kept.shape(parameter)) > 1 for parameter in child.parameters())
            if has_matrix and child in candidates and fits([*found, child], layer_runs, output):
                found.append(child)
            elif has_matrix:
                look_into(child)

    look_into(layer)
    return found if fits(found, model_runs, whole) else []


@dataclass
class _Call:
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@contextmanager
def _noted(layer: nn.Module) -> Generator[tuple[_Call, set[nn.Module]]]:
    """Note with what ``layer`` is called, and its submodules that are called once, with states and nothing else."""
    call, calls = _Call(), Counter[nn.Module]()

    def note_layer(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call.args, call.kwargs = args, kwargs

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        is_plain = not kwargs and len(args) == 1 and _are_states(args[0]) and _are_states(output)
        calls[module] += 1 if is_plain else 2
        candidates.clear()
        candidates.update(module for module, number in calls.items() if number == 1)

    candidates: set[nn.Module] = set()
    hooks = [layer.register_forward_pre_hook(note_layer, with_kwargs=True)]
    hooks += [child.register_forward_hook(note, with_kwargs=True) for child in layer.modules() if child is not layer]
    try:
        yield call, candidates
    finally:
        for hook in hooks:
            hook.remove()


def _are_states(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 3 and value.shape[:2] == (1, _LENGTH)
