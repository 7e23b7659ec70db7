"""Where the weights of a stage come from."""

from __future__ import annotations

from pathlib import Path

from mmit.config import RunConfig
from mmit.errors import ConfigError
from mmit.models import find_model_directory


def start_directory(config: RunConfig, name: str) -> Path | None:
    """The model directory that a stage starts from; None where it starts from the parts of the ``model`` section.

    Raises ConfigError for a stage that has not been trained, CheckpointError where there is no model.
    """
    source = config.stages[name].init_from
    if source == "parts":
        return None
    if source not in config.stages:
        return find_model_directory(Path(source))
    directory = config.stage_folder(source) / "model"
    if not (directory / "mmit.json").is_file():
        raise ConfigError(f"stages.{name}.init_from: stage '{source}' has not been trained; {directory} is missing")
    return directory
