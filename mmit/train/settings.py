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
    "evaluate",
    "spike",
    "zero",
    "parallel",
    "activation_checkpointing",
    "attention",
    "kernels",
    "compile",
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

Where features lie decides nothing either; that there are any counts as ``data.features`` of its own (see below). What
to do at a spike may change, for that is the answer to one: the run that it has stopped goes on without that update.
"""


def deciding_settings(config: RunConfig, stage: str, *, stated: bool = False) -> dict[str, Any]:
    """Path -> value of everything in the run file that decides the weights of ``stage``.

    stated: only what differs from its default.
    """
    content = config.model_dump(mode="json", exclude_defaults=stated)
    flat = _flat({key: content[key] for key in ("model", "seed", "precision") if key in content}, "")
    own = _flat(content["stages"][stage], "")
    kept = {key: value for key, value in own.items() if not _is_harmless(key)}
    # cached features are rounded to bf16; no key where there are none, as before they existed
    if config.stages[stage].data.features != "none":
        kept["data.features"] = "cached"
    return flat | {f"stages.{stage}.{key}": value for key, value in kept.items()}


def check_unchanged(before: Mapping[str, Any], config: RunConfig, stage: str, *, what: Path) -> None:
    """Raise ConfigError, naming settings and both values, where ``before``, which made ``what``, is not the run file's.

    A setting that did not exist at that time may have its default, which is what was done without it.
    """
    now, stated = deciding_settings(config, stage), deciding_settings(config, stage, stated=True)
    changed = [
        f"{key} was {before.get(key, 'not set')!r} and is {now.get(key, 'not set')!r}"
        for key in [*now, *(key for key in before if key not in now and not _is_harmless(_within(key, stage)))]
        if before.get(key) != now.get(key) and (key in before or key in stated)
    ]
    if changed:
        more = f"; and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise ConfigError(
            f"{what} was made with other settings: {'; '.join(changed[:4])}{more}. "
            "Set them back, give the run another 'output', or train the stage again with --fresh"
        )


def _is_harmless(key: str) -> bool:
    """For a key within its stage."""
    return any(key == harmless or key.startswith(f"{harmless}.") for harmless in HARMLESS)


def _within(key: str, stage: str) -> str:
    return key.removeprefix(f"stages.{stage}.")


def _flat(value: Any, path: str) -> dict[str, Any]:  # noqa: ANN401  (a YAML tree)
    if isinstance(value, dict) and value:
        found: dict[str, Any] = {}
        for key, below in value.items():
            found |= _flat(below, f"{path}.{key}" if path else str(key))
        return found
    return {path: value}
