"""A whole run: the sections of its file, and what must hold between them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from mmit.config.model import Model
from mmit.config.sections import Section
from mmit.config.training import Launch, Stage

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class RunConfig(Section):
    """A whole run."""

    name: str
    """Name of the run; letters, digits, '.', '_' and '-'."""
    output: str = "runs/{name}"
    """Folder of the run, ``{name}`` being its name; one folder per stage inside."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """``auto`` is bf16 on an accelerator and fp32 on CPU; ``fp16`` scales the loss and leaves out steps that overflow,
    for devices without bf16."""
    model: Model
    stages: Annotated[dict[str, Stage], Field(min_length=1)]
    """Trained in this order."""
    launch: Launch = Launch()

    @field_validator("name")
    @classmethod
    def _is_a_file_name(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError("only letters, digits, '.', '_' and '-', since it names a folder")
        return name

    @field_validator("stages")
    @classmethod
    def _stage_names(cls, stages: dict[str, Stage]) -> dict[str, Stage]:
        for name in stages:
            if not NAME.fullmatch(name) or name == "parts":
                raise ValueError(f"'{name}' cannot name a stage: letters, digits, '.', '_' and '-', and not 'parts'")
        return stages

    @model_validator(mode="after")
    def _stages_start_from_earlier_ones(self) -> RunConfig:
        names = list(self.stages)
        for name, stage in self.stages.items():
            if stage.init_from in names and names.index(stage.init_from) >= names.index(name):
                raise ValueError(f"stages.{name}.init_from: '{stage.init_from}' is not a stage before it")
        return self

    _file: Path | None = PrivateAttr(default=None)

    @property
    def file(self) -> Path | None:
        """The file that this was read from; recipes are also looked for beside it."""
        return self._file

    def read_from(self, file: Path) -> RunConfig:
        """The same config, knowing its file."""
        self._file = file
        return self

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(self.output.replace("{name}", self.name))

    def stage_folder(self, stage: str) -> Path:
        """The folder of one stage."""
        return self.folder / stage
