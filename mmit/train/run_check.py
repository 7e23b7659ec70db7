"""A run file against the parts it names, in seconds: shapes are compared on the meta device, no weights are read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmit.config import ComposedModel, RunConfig, Stage
from mmit.data.local_shards import check_present
from mmit.errors import ConfigError, MmitError
from mmit.models import LoadedModel, build_model, load_weights
from mmit.models.compiled import why_not_compiled
from mmit.models.encoders import build_encoder
from mmit.models.language_models import read_language_model
from mmit.models.placement import SHAPES, placed
from mmit.models.rules import check_frozen
from mmit.train.choices import RuledOut, not_on_this_machine, ruled_out
from mmit.train.feed import location, make_encode
from mmit.train.origin import start_directory
from mmit.train.sinks import check_sinks
from mmit.train.stage_folder import check_output
from mmit.train.trained import table

DTYPE = torch.float32
"""No value is ever held: any dtype serves."""


@dataclass
class RunReport:
    """What was found: sentences that must be mended, sentences to know, and what each stage trains."""

    mistakes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    trains: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The report to print, where there is no mistake."""
        made = [line for name, rows in self.trains.items() for line in (f"stage {name}", rows)]
        return [*made, *(f"note: {note}" for note in self.notes)]

    def take(self, found: Iterable[RuledOut]) -> None:
        """Note choices that cannot be had."""
        for one in found:
            (self.notes if one.elsewhere else self.mistakes).append(one.told)

    def attempt(self, action: Callable[[], Any]) -> Any:  # noqa: ANN401 - whatever the action gives
        """What ``action`` gives, or None where it raised; its sentence is then a mistake, told once."""
        try:
            return action()
        except MmitError as error:
            if str(error) not in self.mistakes:
                self.mistakes.append(str(error))
            return None


def check_run(config: RunConfig, *, data: bool = True) -> RunReport:
    """Check that parts exist and fit together, that each stage can start with them, and that its data is there.

    data: False leaves the data out. Of shards, only the manifest is read and that the files are there.
    """
    report = RunReport()
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would warn that it found none
    report.attempt(lambda: check_output(config.folder))
    report.take(not_on_this_machine(config))
    with placed(SHAPES):
        loaded = _model(config, report)
        for name, stage in config.stages.items():
            _check_engine(stage, name, report)
            report.attempt(lambda log=stage.log: check_sinks(log))
            if data:
                _check_data(config, name, report)
            if loaded is not None and stage.lora is not None:  # which changes the model
                other = build_model(config.model, dtype=DTYPE, seed=0, adapter="drop")
                _check_stage(config, name, other, report)
            elif loaded is not None:
                _check_stage(config, name, loaded, report)
    return report


def refuse_mistakes(report: RunReport, file: Path) -> None:
    """Raise ConfigError with every mistake of a report."""
    if report.mistakes:
        count = len(report.mistakes)
        lines = "\n".join(f"  {mistake}" for mistake in report.mistakes)
        raise ConfigError(f"{file}: {count} mistake{'s'[: count > 1]}\n{lines}")


def _model(config: RunConfig, report: RunReport) -> LoadedModel | None:
    section = config.model
    loaded = report.attempt(lambda: build_model(section, dtype=DTYPE, seed=0, adapter="drop"))
    if loaded is None and isinstance(section, ComposedModel):  # a part that is missing must not hide another
        report.attempt(lambda: build_encoder(section.encoder, dtype=DTYPE))
        report.attempt(lambda: read_language_model(section.language_model.path, dtype=DTYPE))
    return loaded


def _check_engine(stage: Stage, name: str, report: RunReport) -> None:
    def make() -> None:
        from mmit.train.deepspeed_settings import deepspeed_config
        from mmit.train.ways import own_ways

        try:
            zero = stage.zero
            if zero.stage == "auto":
                zero = zero.model_copy(update={"stage": own_ways(stage, ranks=2)[0].zero_stage})
            deepspeed_config(zero, dtype=DTYPE, rows_per_micro_batch=1, micro_batches=1, clip_norm=1.0)
        except ConfigError as error:
            raise ConfigError(f"stages.{name}.{error}") from None

    report.attempt(make)


def _check_data(config: RunConfig, name: str, report: RunReport) -> None:
    stage = config.stages[name]
    for source in (*stage.data.mix, *(stage.evaluate.mix if stage.evaluate is not None else ())):
        report.attempt(lambda source=source: check_present(location(source, beside=config.file)))
    if stage.evaluate is not None and stage.evaluate.text not in ("none", "probe"):
        report.attempt(lambda text=stage.evaluate.text: check_present(text))


def _check_stage(config: RunConfig, name: str, loaded: LoadedModel, report: RunReport) -> None:
    stage, model = config.stages[name], loaded.model
    report.attempt(lambda: make_encode(stage.data, loaded))
    report.take(ruled_out(stage, name, model, precision=config.precision))
    if stage.init_from not in config.stages:
        directory = report.attempt(lambda: start_directory(config, name))
        if directory is not None:
            report.attempt(lambda: load_weights(model, directory, adapter="drop", connector=loaded.connector))
    if stage.data.features != "none":
        tower = nn.Module()
        tower.vision_tower = model.vision_tower
        adapted = () if stage.lora is None else stage.lora.targets
        report.attempt(lambda: check_frozen(stage.train, tower, adapted=adapted))
    if stage.lora is not None:
        from mmit.models import begin_adapter  # imports peft, which takes longer than all the rest

        report.attempt(lambda: begin_adapter(model, stage.lora, None, seed=0))
    if stage.batch.packing and model.packing_fault:
        report.mistakes.append(f"stages.{name}.batch.packing: {model.packing_fault}; set it to false")
    positions = getattr(model.language_model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and stage.batch.length > positions:
        report.notes.append(
            f"stages.{name}.batch.length: a sample may be as long as {stage.batch.length} tokens, the language model "
            f"was made for {positions}"
        )
    if stage.activation_checkpointing != "auto" and stage.recompute:
        report.attempt(lambda: model.enable_activation_checkpointing(every=stage.recompute))
    if stage.compile:
        attention = model.attention if stage.attention == "auto" else stage.attention
        if reason := why_not_compiled(model.language_model, attention=attention):
            report.mistakes.append(f"stages.{name}.compile: {reason}; set it to false")
    groups = report.attempt(lambda: model.train_only(stage.train))
    if groups is not None:
        report.trains[name] = table(model, groups)
