"""One stage on one rank: parts, data, engine, resume, the loop, and the model directory at the end."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils.logging import disable_progress_bar

from mmit.config import RunConfig, Stage
from mmit.config_file import resolved_yaml
from mmit.data.ahead import lost_workers_named
from mmit.data.atomic import write_whole
from mmit.distributed import (
    is_launched,
    is_lost_connection,
    logger,
    rank,
    set_up_logging,
    world_size,
)
from mmit.errors import ConfigError, Interrupted, OtherRankFailed, TrainingError
from mmit.hub import Revisions, pinning
from mmit.train.agreement import check_ranks_agree
from mmit.train.launch import is_complete
from mmit.train.run_files import revisions_before
from mmit.train.settings import deciding_settings
from mmit.train.stage_folder import BEGUN, open_folder
from mmit.train.stage_parts import announce, attend, build, make_engine

if TYPE_CHECKING:
    from mmit.models import LoadedModel
    from mmit.train.answers import Answers
    from mmit.train.checkpoint import RunState
    from mmit.train.counts import Counts
    from mmit.train.engine import Engine
    from mmit.train.evaluation import Evaluation
    from mmit.train.features import StageFeatures
    from mmit.train.feed import Feed
    from mmit.train.loop import StopRequest
    from mmit.train.saving import Saver
    from mmit.train.work import Work


def train_stage(config: RunConfig, name: str, *, fresh: bool = False) -> Path:
    """Train one stage to its end and give its model directory; runs on every rank of a launch.

    Continues from the newest complete checkpoint of the stage unless ``fresh``.
    Raises MmitError subclasses for what the user can mend, Interrupted after SIGTERM or Ctrl-C.
    """
    if not is_launched():
        raise ConfigError(
            "a stage is trained by ranks: start it with `mmit train`, `deepspeed --module mmit train` or torchrun"
        )
    prepare_process()
    if not fresh and is_complete(config, name):
        return config.stage_folder(name) / "model"
    from mmit.train.engine import init_process_group
    from mmit.train.loop import StopRequest

    stop = StopRequest()  # before the parts are loaded, so that no signal is lost
    init_process_group()
    try:
        with lost_workers_named():
            return _train(config, name, stop=stop, fresh=fresh)
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        logger.error("rank %d has lost another rank, which was killed or whose machine is gone", rank())
        raise OtherRankFailed("a rank was lost") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise TrainingError(
            f"{config.stage_folder(name)}: {error.strerror}; make room and run the same command again, which goes on "
            "from the newest checkpoint"
        ) from error
    finally:
        torch.distributed.destroy_process_group()


def prepare_process() -> None:
    """Set up logging, threads and the libraries of a process that trains or runs a tower."""
    set_up_logging()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader forks
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would warn that it found none
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    disable_progress_bar()  # one bar per rank and file would bury the log


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """A stage whose parts, data and engine stand; ``state`` says how far it had come."""

    config: RunConfig
    name: str
    loaded: LoadedModel
    features: StageFeatures | None
    feed: Feed
    evaluation: Evaluation | None
    answers: Answers | None
    engine: Engine
    state: RunState
    work: Work | None
    commits: Mapping[str, str]

    @property
    def stage(self) -> Stage:
        return self.config.stages[self.name]

    @property
    def folder(self) -> Path:
        return self.config.stage_folder(self.name)


def _train(config: RunConfig, name: str, *, stop: StopRequest, fresh: bool) -> Path:
    from mmit.train import checkpoint, nvme
    from mmit.train.engine import resolve_precision
    from mmit.train.zero_choice import with_way

    folder, zero = config.stage_folder(name), nvme.zero_of(config, name)
    checkpoint.collectively(lambda: nvme.prepare(zero, where=f"stages.{name}.zero"), what=folder)
    held = checkpoint.collectively(lambda: open_folder(folder, fresh=fresh) if rank() == 0 else None, what=folder)
    try:
        config = with_way(config, name, dtype=resolve_precision(config.precision))
        with pinning(revisions_before(config, name)) as revisions:
            ready = _make_ready(config, name, revisions, stop=stop)
        if rank() == 0:
            write_whole(folder / BEGUN, resolved_yaml(config).encode())
        announce(config, name, ready.feed.plan)
        return _run(ready, stop=stop)
    finally:
        nvme.remove(zero)
        if held is not None:
            held.close()


def _make_ready(config: RunConfig, name: str, revisions: Revisions, *, stop: StopRequest) -> _Ready:
    from mmit.train import checkpoint
    from mmit.train.answers import plan_answers
    from mmit.train.engine import resolve_precision
    from mmit.train.evaluation import plan_evaluation
    from mmit.train.features import stage_features
    from mmit.train.feed import make_feed
    from mmit.train.sequence import share
    from mmit.train.sinks import check_sinks
    from mmit.train.work import is_measured, work_of

    stage, folder = config.stages[name], config.stage_folder(name)
    check_sinks(stage.log)
    dtype = resolve_precision(config.precision)
    features = stage_features(config, name, dtype=dtype, stop=stop)
    loaded = build(config, name, dtype=dtype, tower=None if features is None else features.tower)
    attend(loaded, stage, name)
    share(loaded, stage, name)
    feed = make_feed(config, stage, loaded, features)
    state = checkpoint.RunState(
        step=0,
        stage=name,
        plan=feed.plan.fingerprint,
        world=world_size(),
        zero_stage=stage.zero.number,
        precision=str(dtype).removeprefix("torch."),
        settings=deciding_settings(config, name),
    )
    evaluation = plan_evaluation(config, name, feed)
    answers = plan_answers(config, name, loaded, evaluation, feed.encode.template)
    held_out = " ".join(part.fingerprint for part in (evaluation, answers) if part is not None)
    commits = revisions.commits()
    check_ranks_agree(state, {"held-out plan": held_out, "revision on the hub": commits})
    count_work = work_of(loaded.model) if is_measured(stage.log.mfu) else None
    engine = make_engine(config, name, loaded, dtype=dtype)
    work = None if count_work is None else count_work()
    state = checkpoint.resume(folder / "checkpoints", engine, state, steps=feed.plan.steps, config=config)
    return _Ready(
        config=config,
        name=name,
        loaded=loaded,
        features=features,
        feed=feed,
        evaluation=evaluation,
        answers=answers,
        engine=engine,
        state=state,
        work=work,
        commits=commits,
    )


def _run(ready: _Ready, *, stop: StopRequest) -> Path:
    from mmit.train import checkpoint
    from mmit.train.insight import make_insight, open_recorder
    from mmit.train.loop import train_steps
    from mmit.train.measuring import Measuring
    from mmit.train.optim import LearningRate
    from mmit.train.run_files import write_facts
    from mmit.train.skipped import SkippedRecord
    from mmit.train.trained import FirstStepCheck
    from mmit.train.watchdog import SAVING, Watchdog

    stage, folder, state, steps = ready.stage, ready.folder, ready.state, ready.feed.plan.steps
    made_from = checkpoint.facts(
        ready.config, stage=ready.name, plan=ready.feed.plan.fingerprint, revisions=ready.commits
    )
    if rank() == 0:
        write_facts(folder, made_from, ready.feed.plan)
    skipped = SkippedRecord(folder, ready.feed.plan, state, max_skipped=stage.data.max_skipped)
    saver = _saver_of(ready, lambda: made_from | skipped.facts(), stop)
    check = FirstStepCheck(ready.engine.module, seldom=ready.loaded.model.by_row)
    insight = make_insight(ready.config, ready.name, ready.engine, state, ready.work)
    done, first = state.step, state.step + 1

    def save(*, in_step: bool) -> None:
        watchdog.mark(SAVING, step=done)
        now = replace(state, step=done, skipped=dict(skipped.totals), spikes=insight.spikes.state)
        saver.save(now, in_step=in_step, best=measuring.best if stage.save.keep_best else None)

    def after_step(step: int, counts: Counts) -> None:
        nonlocal done
        done = step
        if not check.is_done and (counts.images > 0 or step == first):
            check.verify(had_images=counts.images > 0)
        measuring.after(step, watchdog, last=step == steps)
        is_best = stage.save.keep_best and measuring.best == step
        if (is_best or step % stage.save.every_steps == 0) and step < steps:
            save(in_step=False)

    loader = ready.feed.loader(start_step=state.step)
    recorder = open_recorder(ready.config, ready.name, ready.engine, ready.work, steps=steps, resume_step=state.step)
    measuring = Measuring(ready.evaluation, ready.answers, ready.engine, recorder, folder=folder, step=state.step)
    watchdog = Watchdog(stall_seconds=ready.config.launch.stall_seconds, reading=loader.reading)
    try:
        measuring.before(watchdog)
        finished = train_steps(
            loader,
            ready.engine,
            LearningRate.of(stage.optim, steps=steps),
            recorder,
            skipped,
            insight=insight,
            stop=stop,
            watchdog=watchdog,
            seed=ready.config.seed,
            after_step=after_step,
        )
        if not finished:
            if done > state.step:
                save(in_step=True)
            raise Interrupted(_stopped(ready.name, step=done, steps=steps))
        watchdog.mark(SAVING, step=done)
        return _finish(folder, saver, ready.features)
    finally:
        saver.close()
        watchdog.close()
        if recorder is not None:
            recorder.close()


def _stopped(name: str, *, step: int, steps: int) -> str:
    if step == 0:
        return f"stage {name}: stopped before its first step; the same command starts it again"
    return f"stage {name}: stopped, and saved at step {step} of {steps}; the same command continues it"


def _saver_of(ready: _Ready, made_from: Callable[[], dict[str, Any]], stop: StopRequest) -> Saver:
    from mmit.train.model_writer import ModelWriter
    from mmit.train.saving import make_saver

    folder = ready.folder / "checkpoints"
    model = ModelWriter(ready.engine, ready.loaded, made_from, ready.features, folder)
    return make_saver(folder, ready.engine, model, ready.stage.save, on_failure=stop.ask)


def _finish(folder: Path, saver: Saver, features: StageFeatures | None) -> Path:
    saver.finish()
    saver.write_model(folder / "model")
    if features is not None and rank() == 0:
        features.file.unlink(missing_ok=True)
    logger.info("saved %s", folder / "model")
    return folder / "model"
