"""What every vision encoder offers, and what a tower that is read at chosen layers offers beyond it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from mmit.errors import ConfigError

Cls = Literal["drop", "keep"]
Layer = int | tuple[int, ...]
"""One hidden state, or several whose features are joined; counted as in transformers' ``hidden_states``."""


@dataclass(frozen=True, kw_only=True)
class ImageInput:
    """What the encoder was trained on: size (H, W) in pixels, mean and std of pixels in 0..1."""

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@runtime_checkable
class VisionEncoder(Protocol):
    """Pixels (N, 3, H, W), normalised -> patch features (N, ``patches``, ``width``)."""

    width: int
    patches: int
    image: ImageInput

    def __call__(self, pixels: Tensor) -> Tensor:
        """Patch features (N, P, width) of normalised pixels (N, 3, H, W)."""
        ...


@runtime_checkable
class ReadsWeights(Protocol):
    """An encoder of one's own whose weights lie in a file: ``read_weights`` is called when a model is composed of it.

    A model directory holds the weights itself: there the class is only built, and the file need not exist any more.
    """

    def read_weights(self) -> None:
        """Fill the encoder with the weights it begins with."""
        ...


@dataclass(frozen=True, kw_only=True)
class HubForm:
    """A tower as a vision model of transformers: how it stands in a model directory.

    config: its ``vision_config``. prefix: the beginning of its tensors' names on disk. on_disk: the tower's name of a
    tensor, without ``vision_tower.model.`` -> the name behind the prefix, or those of the pieces to join along the
    first dimension. also_read: another name that transformers writes -> the one on disk. class_tokens: 1 or 0.
    why_not_llava: why its LLaVA classes would read other features from it, or None.
    """

    config: Mapping[str, Any]
    prefix: str
    on_disk: Callable[[str], tuple[str, ...]]
    also_read: Callable[[str], str]
    class_tokens: int
    why_not_llava: str | None


@runtime_checkable
class LayeredTower(Protocol):
    """A tower that is read at some of its hidden states.

    reads: the hidden states, 0 the embeddings, ``depth`` the last layer's output without the final norm. blocks: the
    name of its list of layers. drops_cls: whether it has a class token and leaves it out.
    """

    reads: tuple[int, ...]
    depth: int
    blocks: str
    drops_cls: bool
    image: ImageInput

    def hub_form(self) -> HubForm | None:
        """How transformers holds the same tower, or None where no class of it does."""
        ...

    def architecture(self) -> dict[str, Any]:
        """From what ``frame_tower`` builds the tower again, in plain values."""
        ...


def states_to_read(layer: Layer, depth: int) -> tuple[int, ...]:
    """The hidden states that ``layer`` names, counted from 0; raises ConfigError for one that does not exist."""
    wanted = (layer,) if isinstance(layer, int) else layer
    counts = tuple(count if count >= 0 else depth + 1 + count for count in wanted)
    for given, count in zip(wanted, counts, strict=True):
        if not 0 <= count <= depth:
            raise ConfigError(
                f"model.encoder.layer: {given} does not exist in an encoder of {depth} layers; "
                f"take {-depth - 1} to {depth}"
            )
    return counts


def refuse_embeddings(reads: tuple[int, ...], library: str) -> None:
    """Raise ConfigError where hidden state 0 is asked of a library that does not give it."""
    if 0 in reads:
        raise ConfigError(f"model.encoder.layer: {library} does not give the embeddings; take 1 or more, or -1 or less")


def feature_layer(tower: LayeredTower) -> int | list[int]:
    """The hidden states that are read, counted from the end: -1 the last layer; a list for several."""
    from_end = [count - tower.depth - 1 for count in tower.reads]
    return from_end[0] if len(from_end) == 1 else from_end


def joined(states: Mapping[int, Tensor], reads: tuple[int, ...]) -> Tensor:
    """The features (N, P, D) of each hidden state that is read, side by side: (N, P, D * len(reads))."""
    return states[reads[0]] if len(reads) == 1 else torch.cat([states[number] for number in reads], dim=-1)


def check_input_size(size: int, patch: int) -> None:
    """Raise ConfigError for an input size that does not hold whole patches."""
    if size % patch:
        below = size - size % patch
        raise ConfigError(
            f"model.encoder.image_size: {size} is no multiple of the patch size {patch}; "
            f"take {f'{below} or ' if below else ''}{below + patch}"
        )
