"""One plain model from a model directory with an adapter."""

from __future__ import annotations

from pathlib import Path

import torch

from mmit.errors import CheckpointError, ConfigError
from mmit.models.adapter_names import holds_adapter
from mmit.models.formats import read_contents, read_json
from mmit.models.load import find_model_directory, load_model
from mmit.models.save import save_model

_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def merge_directory(source: Path | str, target: Path | str) -> Path:
    """Write the model of ``source`` with its adapter added to the weights to ``target``, in the precision it has.

    Raises CheckpointError where ``source`` holds no adapter, ConfigError where ``target`` exists.
    """
    directory, target = find_model_directory(source), Path(target)
    if not holds_adapter(directory):
        raise CheckpointError(f"{directory} holds no adapter: there is nothing to merge")
    if target.exists():
        raise ConfigError(f"{target} exists; give a directory that does not")
    precision = str(read_contents(directory).config.get("torch_dtype"))
    if precision not in _PRECISIONS:
        raise CheckpointError(f"{directory}/base/config.json: torch_dtype {precision} is none of {list(_PRECISIONS)}")
    loaded = load_model(directory, dtype=_PRECISIONS[precision])
    made_from = {"merged": str(directory.absolute())} | dict(read_json(directory / "mmit.json").get("made_from", {}))
    save_model(loaded, None, target, made_from=made_from)
    return target
