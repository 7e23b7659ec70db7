"""Tensor names in memory and on disk.

In memory: ``vision_tower.model.*`` (the tower's own names), ``multi_modal_projector.*``, ``language_model.*``.
On disk: the names of LLaVA models on the hub, ``vision_tower.vision_model.*``, ``multi_modal_projector.linear_1.*``,
``language_model.model.*``, ``language_model.lm_head.weight``, which every version of transformers and vLLM reads.
DINO towers have no ``vision_model.`` there. The two other layouts that transformers writes are read too. A tower that
no class of transformers holds keeps its own names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from mmit.models.adapter_names import is_adapter, plain_name
from mmit.models.encoders import HubForm, LayeredTower

_TOWER = "vision_tower."
_MODEL = "vision_tower.model."
# transformers 5 with save_original_format=False; the order matters
_NATIVE_V5 = (
    ("model.vision_tower.", _TOWER),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("model.image_newline", "image_newline"),
    ("lm_head.", "language_model.lm_head."),
)
# Buffers that older versions of transformers saved and newer ones compute.
_COMPUTED = ("embeddings.position_ids", "rotary_emb.inv_freq")


def hub_name(stored: str, form: HubForm | None) -> str:
    """The hub's name of a stored tensor, whichever of transformers' layouts it comes from.

    form: that of the tower, None for one that keeps its own names.
    """
    name = stored
    for old, new in _NATIVE_V5:
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    if form is not None and name.startswith(_TOWER):
        name = form.prefix + form.also_read(name.removeprefix(_TOWER).removeprefix("vision_model."))
    return name


def is_computed(stored: str) -> bool:
    """True for a stored buffer that the model computes itself."""
    return stored.endswith(_COMPUTED)


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that are stored, by name in memory: parameters (a tied one once) and persistent buffers.

    Those of an adapter are left out, and the others have the names that they have without one.
    """
    stored = set(model.state_dict(keep_vars=True))
    yield from ((plain_name(name), parameter) for name, parameter in model.named_parameters() if not is_adapter(name))
    yield from ((plain_name(name), buffer) for name, buffer in model.named_buffers() if name in stored)


def tied_names(model: nn.Module) -> dict[str, str]:
    """Names of parameters that are another parameter: second name -> first name."""
    first: dict[int, str] = {}
    again: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            again[plain_name(name)] = first[id(parameter)]
        else:
            first[id(parameter)] = plain_name(name)
    return again


def disk_names(tower: nn.Module, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Name in memory -> the name on disk, or the names of the pieces to join along their first dimension."""
    form = hub_form(tower)
    return {name: _on_disk(form, name) for name in names}


def to_disk(tower: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state in memory under its names on disk; joined tensors are split."""
    form = hub_form(tower)
    stored: dict[str, Tensor] = {}
    for name, tensor in state.items():
        pieces = _on_disk(form, name)
        parts = (tensor,) if len(pieces) == 1 else tensor.chunk(len(pieces))
        for piece, part in zip(pieces, parts, strict=True):
            # A clone: safetensors refuses tensors that share memory, such as the pieces of one.
            stored[piece] = part.contiguous() if len(pieces) == 1 else part.clone()
    return stored


def hub_form(tower: nn.Module) -> HubForm | None:
    """How transformers holds the tower, or None where it keeps its own names."""
    return tower.hub_form() if isinstance(tower, LayeredTower) else None


def _on_disk(form: HubForm | None, name: str) -> tuple[str, ...]:
    if form is None or not name.startswith(_MODEL):
        return (name,)
    return tuple(form.prefix + piece for piece in form.on_disk(name.removeprefix(_MODEL)))
