"""Ranks that would not train the same thing end before the first step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mmit.distributed import ranks_that_differ
from mmit.errors import TrainingError

if TYPE_CHECKING:
    from mmit.train.checkpoint import RunState


def check_ranks_agree(state: RunState, others: Mapping[str, Any]) -> None:
    """Raise TrainingError where ranks would train on other plans, settings or versions; collective.

    others: what else they must share, by its name.
    """
    liger = ["liger-kernel"] if find_spec("liger_kernel") else []  # it is looked for, and taken where it is found
    versions = {package: version(package) for package in ("mmit", "torch", "transformers", "deepspeed", *liger)}
    parts = {"plan": state.plan, "precision": state.precision, "settings": state.settings, "versions": versions}
    for what, value in {**parts, **others}.items():
        if differ := ranks_that_differ(json.dumps(value, sort_keys=True, default=str)):
            raise TrainingError(
                f"ranks {', '.join(map(str, differ))} have another {what} than rank 0; "
                "give all hosts the same run file, shards and packages"
            )
