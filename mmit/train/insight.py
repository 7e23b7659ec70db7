"""What looks on while a stage trains; nothing of it changes a weight, but a spike whose update is skipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmit.config import RunConfig
from mmit.distributed import rank
from mmit.train.device_facts import write_device
from mmit.train.metrics import Recorder
from mmit.train.sinks import open_sinks
from mmit.train.spikes import Spikes
from mmit.train.update_ratio import UpdateRatios
from mmit.train.work import Work

if TYPE_CHECKING:
    from mmit.train.checkpoint import RunState
    from mmit.train.engine import Engine


@dataclass(frozen=True, kw_only=True)
class Insight:
    """work: None where no MFU is told."""

    spikes: Spikes
    ratios: UpdateRatios
    work: Work | None


def make_insight(config: RunConfig, name: str, engine: Engine, state: RunState, work: Work | None) -> Insight:
    """What the run file asks for. state: where the stage goes on."""
    stage = config.stages[name]
    return Insight(
        spikes=Spikes(stage.spike, state.spikes, stage=name),
        ratios=UpdateRatios(engine, every=stage.log.update_ratio_every),
        work=work,
    )


def open_recorder(
    config: RunConfig, name: str, engine: Engine, work: Work | None, *, steps: int, resume_step: int
) -> Recorder | None:
    """The record of a stage of so many steps, which goes on after ``resume_step``; None on other ranks than 0."""
    if rank():
        return None
    write_device(config.stage_folder(name), engine, work)
    log, folder = config.stages[name].log, config.stage_folder(name)
    content = config.model_dump(mode="json")
    shown = {**{key: value for key, value in content.items() if key != "stages"}, "stage": content["stages"][name]}
    sinks = open_sinks(log, folder, title=f"{config.name}-{name}", config=shown, resume_step=resume_step)
    return Recorder(folder, steps=steps, every_steps=log.every_steps, resume_step=resume_step, sinks=sinks)
