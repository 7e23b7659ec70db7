"""A tower that is not there: its outputs are read from disk, so that training needs none of its weights.

The tower is read once, alone, before the language model: to know what its outputs are made by. Then its weights are put
into a file, its modules stay as a frame without storage, and the file fills the frame's place whenever the model is
written.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TypeVar

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmit.errors import CheckpointError
from mmit.models.encoders import ImageInput, VisionEncoder
from mmit.models.layout import tensors_of

_PREFIX = "vision_tower."
M = TypeVar("M", bound=nn.Module)


class AbsentTower(nn.Module):
    """Stands where a tower would stand: its shape without its weights. Gives up the weights of ``tower``.

    frame: the modules of the tower on the meta device; no child of this module, whose parameters are none.
    """

    frame: nn.Module
    width: int
    patches: int
    image: ImageInput

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        assert isinstance(tower, VisionEncoder), "build_encoder checks it"
        self.width, self.patches, self.image = tower.width, tower.patches, tower.image
        self.__dict__["frame"] = tower.to("meta")

    def forward(self, pixels: Tensor) -> Tensor:
        """Never: a model without its tower is given features."""
        raise AssertionError(f"{len(pixels)} tiles came to a tower that is not there; the batch must hold features")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters that are not there, as they would be in the model."""
        return tuple(_PREFIX + name for name, _ in self.frame.named_parameters())


def frame_of(tower: nn.Module) -> nn.Module:
    """The modules of a tower, whether its weights are there or not."""
    return tower.frame if isinstance(tower, AbsentTower) else tower


def put_aside(tower: nn.Module, file: Path) -> None:
    """Write the tensors of a tower into one file. Raises CheckpointError."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        save_file({_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in tensors_of(tower)}, partial)
        os.replace(partial, file)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be written: {error.strerror or error}") from None


def made_whole(model: M, file: Path) -> tuple[M, dict[str, Tensor]]:
    """The model with the frame in its place, and the tower's tensors by their names there, read when used.

    ``model`` itself stays as it is, and may be training meanwhile: the other modules are shared.
    """
    absent = model.get_submodule("vision_tower")
    assert isinstance(absent, AbsentTower), "only an absent tower is put back"
    whole = copy.copy(model)
    whole.__dict__["_modules"] = {**model._modules, "vision_tower": absent.frame}
    return whole, load_file(file)
