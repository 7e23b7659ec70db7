"""That what is measured is not trained on."""

from __future__ import annotations

import numpy as np

from mmit.data import Plan, ShardSet
from mmit.errors import ConfigError


def check_apart(shards: ShardSet, numbers: np.ndarray, plan: Plan, *, where: str) -> None:
    """Raise ConfigError where one of the samples ``numbers`` of ``shards`` is in the plan of the stage."""
    for source, trained in enumerate(plan.sources):
        if len(trained) != len(shards):
            continue
        drawn = plan.sample_of[: plan.samples][plan.source_of[: plan.samples] == source]
        both = np.intersect1d(numbers, drawn)
        if len(both) and trained.place(int(both[0])) == shards.place(int(both[0])):
            raise ConfigError(
                f"{where}: {len(both)} of the {len(numbers)} held-out samples of {shards.name} are trained on too; "
                "give it other shards, or a part of its own, as 'subset: last 5%' here and 'subset: first 95%' in "
                "data.mix"
            )
