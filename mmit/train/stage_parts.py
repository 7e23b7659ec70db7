"""The model and the engine of a stage: built, filled with the weights it starts from, given to DeepSpeed, announced."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from mmit.config import RunConfig, Stage
from mmit.distributed import Readers, logger, world_size
from mmit.errors import ConfigError

if TYPE_CHECKING:
    from mmit.data import Plan
    from mmit.models import LoadedModel, VisionLanguageModel
    from mmit.models.absent import AbsentTower
    from mmit.train.engine import Engine


def build(config: RunConfig, name: str, *, dtype: torch.dtype, tower: AbsentTower | None) -> LoadedModel:
    """The model of a stage: from its parts, from a stage before it, or from a directory; the same on every rank."""
    from mmit.config import WholeModel
    from mmit.models import build_model, find_model_directory, holds_adapter, load_weights
    from mmit.models.placement import WHOLE, placed
    from mmit.train.allocator import memory_given_back
    from mmit.train.origin import start_directory
    from mmit.train.partition import Partitioned

    stage = config.stages[name]
    in_pieces = stage.zero.number == 3
    kept = Partitioned(_engine_settings(config, name, dtype)) if in_pieces else WHOLE
    with memory_given_back() if in_pieces else nullcontext(), placed(kept):
        loaded = build_model(config.model, dtype=dtype, seed=config.seed, adapter="drop", tower=tower)
    directory = start_directory(config, name)
    if directory is not None:
        load_weights(loaded.model, directory, adapter="drop", connector=loaded.connector)
        logger.info("weights from %s", directory)
    elif isinstance(config.model, WholeModel):
        directory = find_model_directory(config.model.path)
    if stage.lora is not None or (directory is not None and holds_adapter(directory)):
        from mmit.models import begin_adapter

        begin_adapter(loaded.model, stage.lora, directory, seed=config.seed)
    return loaded


def attend(loaded: LoadedModel, stage: Stage, name: str) -> None:
    """Give the language model the attention of the stage, and refuse packing where it would mix samples."""
    from mmit.train.engine import device

    model = loaded.model
    if stage.attention != "auto":
        model.to(device())  # where it is tried, and stays
        model.use_attention(stage.attention)
    if stage.batch.packing and model.packing_fault:
        raise ConfigError(
            f"stages.{name}.batch.packing: {model.packing_fault}; set it to false, so that every row is one sample"
        )


def make_engine(config: RunConfig, name: str, loaded: LoadedModel, *, dtype: torch.dtype) -> Engine:
    """DeepSpeed's engine around the model, with what the stage trains made trainable."""
    from mmit.train.allocator import keep_freed_memory
    from mmit.train.engine import Engine, device
    from mmit.train.optim import adamw, parameter_groups
    from mmit.train.trained import table

    stage, model = config.stages[name], loaded.model
    groups = model.train_only(stage.train)
    if stage.recompute:
        model.enable_activation_checkpointing(every=stage.recompute)
    logger.info("%s", table(model, groups))
    model.to(device())
    if device().type == "cpu":
        keep_freed_memory()
    _accelerate(model, stage, name)
    optimizer = adamw(
        parameter_groups(model, groups, weight_decay=stage.optim.weight_decay),
        betas=stage.optim.betas,
        eps=stage.optim.eps,
    )
    return Engine(model, optimizer, _engine_settings(config, name, dtype), dtype=dtype)


def _accelerate(model: VisionLanguageModel, stage: Stage, name: str) -> None:
    """Choose what the layers of the language model run with, where they lie."""
    from mmit.models.compiled import compile_layers
    from mmit.models.kernels import use_kernels

    if stage.compile and stage.zero.number == 3:
        raise ConfigError(
            f"stages.{name}.compile: zero.stage auto is 3 here, and layers in pieces are not compiled; set it to false"
        )
    try:
        use_kernels(model.language_model, stage.kernels, model.placement, is_compiled=stage.compile)
        if stage.compile:
            compile_layers(model.language_model, attention=model.attention)
    except ConfigError as error:
        raise ConfigError(f"stages.{name}.{error}") from None


def announce(config: RunConfig, name: str, plan: Plan) -> None:
    """Tell how the stage is cut into steps, ranks and micro-batches."""
    from mmit.train.deepspeed_settings import accumulation

    batch = config.stages[name].batch
    readers = Readers(config.stages[name].parallel.sequence).count
    micro = accumulation(
        rows_per_step=batch.rows_per_step, rows_per_micro_batch=batch.rows_per_micro_batch, readers=readers
    )
    logger.info(
        "stage %s: %d samples in %d steps of %d rows x %d tokens; ZeRO-%d, %d ranks x %d micro-batches of %d rows",
        name,
        plan.samples,
        plan.steps,
        batch.rows_per_step,
        batch.length,
        config.stages[name].zero.number,
        world_size(),
        micro,
        batch.rows_per_micro_batch,
    )
    idle = micro * batch.rows_per_micro_batch * readers - batch.rows_per_step
    if idle:
        logger.info(
            "%d of %d row places of a step stay empty: %d rows per step over %d readers x %d micro-batches x %d rows",
            idle,
            idle + batch.rows_per_step,
            batch.rows_per_step,
            readers,
            micro,
            batch.rows_per_micro_batch,
        )


def _engine_settings(config: RunConfig, name: str, dtype: torch.dtype) -> dict[str, Any]:
    from mmit.train.deepspeed_settings import accumulation, deepspeed_config
    from mmit.train.nvme import zero_of

    stage = config.stages[name]
    rows = stage.batch.rows_per_micro_batch
    return deepspeed_config(
        zero_of(config, name),
        dtype=dtype,
        rows_per_micro_batch=rows,
        micro_batches=accumulation(
            rows_per_step=stage.batch.rows_per_step,
            rows_per_micro_batch=rows,
            readers=Readers(stage.parallel.sequence).count,
        ),
        clip_norm=stage.optim.clip_norm,
    )
