"""The settings that decide what a stage computes, and how two runs differ in them.

A stage that is complete or half done is not silently taken for another one after its run file was edited.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmit.config import RunConfig
from mmit.errors import ConfigError

HARMLESS = (
    "save",
    "log",
    "zero",
    "activation_checkpointing",
    "attention",
    "batch.rows_per_micro_batch",
    "data.workers",
    "data.max_skipped",
    "data.on_missing_shard",
    "data.cache",
    "data.cache_gb",
    "data.features",
    "data.missing_features",
)
"""Settings of a stage that change nothing in its weights but the order of sums, so that a run may go on with others.

Where features lie decides nothing either; that there are any counts as ``data.features`` of its own (see below).
"""


def deciding_settings(config: RunConfig, stage: str) -> dict[str, Any]:
    """Path -> value of everything in the run file that decides the weights of ``stage``."""
    content = config.model_dump(mode="json")
    flat = _flat({"model": content["model"], "seed": config.seed, "precision": config.precision}, "")
    own = _flat(content["stages"][stage], "")
    kept = {k: v for k, v in own.items() if not any(k == h or k.startswith(f"{h}.") for h in HARMLESS)}
    if own["data.features"] != "none":  # they are rounded to bf16; no key where there are none, as before they existed
        kept["data.features"] = "cached"
    return flat | {f"stages.{stage}.{key}": value for key, value in kept.items()}


def check_unchanged(before: Mapping[str, Any], now: Mapping[str, Any], *, what: Path) -> None:
    """Raise ConfigError, naming the settings and both values, where ``now`` is not what ``what`` was made with."""
    changed = [
        f"{key} was {before.get(key, 'not set')!r} and is {now.get(key, 'not set')!r}"
        for key in [*now, *(key for key in before if key not in now)]
        if before.get(key) != now.get(key)
    ]
    if changed:
        more = f"; and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise ConfigError(
            f"{what} was made with other settings: {'; '.join(changed[:4])}{more}. "
            "Set them back, give the run another 'output', or train the stage again with --fresh"
        )


def _flat(value: Any, path: str) -> dict[str, Any]:  # noqa: ANN401  (a YAML tree)
    if isinstance(value, dict) and value:
        found: dict[str, Any] = {}
        for key, below in value.items():
            found |= _flat(below, f"{path}.{key}" if path else str(key))
        return found
    return {path: value}
