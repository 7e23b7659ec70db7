"""Rows that several ranks share: who shares with whom, and the model told so before it trains."""

from __future__ import annotations

import torch

from mmit.config import Stage
from mmit.distributed import logger, rank, world_size
from mmit.errors import ConfigError
from mmit.models import LoadedModel
from mmit.models.shared_rows import RowGroup, share_rows
from mmit.train.engine import device
from mmit.train.launch import check_ranks


def share(loaded: LoadedModel, stage: Stage, name: str) -> None:
    """Let every ``parallel.sequence`` consecutive ranks share their rows; collective. Nothing to do for 1.

    Raises ConfigError where the ranks or the model do not allow it.
    """
    size = stage.parallel.sequence
    if size == 1:
        return
    check_ranks(stage, name, world_size())
    ranks, _ = torch.distributed.new_subgroups(group_size=size)
    assert ranks is not None, "every rank is in a group"
    loaded.model.to(device())  # where it is tried, and stays
    try:
        share_rows(loaded.model, RowGroup(ranks, rank() % size, size))
    except ConfigError as error:
        raise ConfigError(f"stages.{name}.{error}") from None
    logger.info("each row is shared by %d ranks, which read it together", size)
