"""What a stage leaves in its folder beside weights, written and read: ``stage.json``, metrics, skipped samples.

Reading takes the folder as it is, of a stage that still runs or was killed too; nothing in it is believed to be whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mmit.errors import ConfigError

if TYPE_CHECKING:
    from mmit.config import RunConfig
    from mmit.data import Plan

FACTS = "stage.json"
"""What a stage is made from, and what its plan amounts to."""
DEVICE = "device.json"
"""What a rank holds in memory by part of the model, and what its devices can do."""
ON_HOST, ON_DISK = ", in the memory of the host", ", on disk"
"""In it, behind the name of what was moved there."""
MODEL_FACTS = ("mmit.json", "base/mmit.json")
"""Where a model directory tells what it was made from; the second is that of an adapter."""


@dataclass(frozen=True, kw_only=True)
class StageFiles:
    """What is known of a stage from its folder, or from the directory of a model that it made.

    config: the whole run file with every default. facts: versions, git, ranks, plan and data. steps, held_out: the
    lines of ``metrics.jsonl`` and ``evaluation.jsonl``. answers: those of ``answers.jsonl``. skipped: those of
    ``skipped-rank*.jsonl``. device: memory by part. checkpoints: name -> bytes.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    facts: Mapping[str, Any]
    steps: list[dict[str, Any]] = field(default_factory=list)
    held_out: list[dict[str, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    device: Mapping[str, Any] = field(default_factory=dict)
    checkpoints: Mapping[str, int] = field(default_factory=dict)

    @property
    def stage(self) -> Mapping[str, Any]:
        """The section of the stage."""
        return self.config.get("stages", {}).get(self.name, {})

    @property
    def is_complete(self) -> bool:
        """True where the model of the stage stands."""
        return (self.folder / "model").is_dir()


def write_facts(folder: Path, made_from: Mapping[str, Any], plan: Plan) -> None:
    """Write ``stage.json``; ``made_from`` is what the model directory will say too."""
    from mmit.data.summary import shares_of

    data = {"steps": plan.steps, "samples": plan.samples, "rows": plan.rows}
    content = {**made_from, "data": {**data, "sources": [asdict(share) for share in shares_of(plan)]}}
    (folder / FACTS).write_text(json.dumps(content, indent=1), encoding="utf-8")


def revisions_before(config: RunConfig, name: str) -> dict[str, str]:
    """Name -> commit of what a stage, or else the one that it starts from, read from the hub when it began."""
    while name in config.stages:
        facts = _json(config.stage_folder(name) / FACTS)
        if "revisions" in facts:
            return {one: commit for one, commit in _mapping(facts, "revisions").items() if isinstance(commit, str)}
        name = config.stages[name].init_from
    return {}


def read_run(folder: Path) -> list[StageFiles]:
    """The stages of a run folder in their order, or the one of a stage folder. Raises ConfigError where it is none."""
    if (folder / "config.yaml").is_file():
        return [_read_stage(folder)]
    found = sorted(path.parent for path in folder.glob("*/config.yaml"))
    if not found:
        raise ConfigError(
            f"{folder}: no run of mmit, for there is no config.yaml in it or in a folder of it; give the 'output' of a "
            "run file, or the folder of one of its stages"
        )
    stages = [_read_stage(path) for path in found]
    order = list(stages[0].config.get("stages", {}))
    return sorted(stages, key=lambda one: order.index(one.name) if one.name in order else len(order))


def read_run_or_model(folder: Path) -> list[StageFiles]:
    """As ``read_run``, also for a model directory, of which only ``mmit.json`` is known. Raises ConfigError."""
    facts = _model_facts(folder)
    if facts is None:
        return read_run(folder)
    return [StageFiles(folder=folder, name=str(facts.get("stage", "")), config=_mapping(facts, "config"), facts=facts)]


def _read_stage(folder: Path) -> StageFiles:
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{folder / 'config.yaml'}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(config, dict) or not isinstance(config.get("stages"), dict):
        raise ConfigError(f"{folder / 'config.yaml'}: is not the run file of a stage of mmit")
    checkpoints = sorted(path.parent for path in folder.glob("checkpoints/step-*/COMPLETE"))
    models = [folder / "model", *(path / "model" for path in reversed(checkpoints))]
    facts = _json(folder / FACTS) or next((found for path in models if (found := _model_facts(path))), {})
    name = str(facts.get("stage", folder.resolve().name))
    return StageFiles(
        folder=folder,
        name=name if name in config["stages"] else folder.resolve().name,
        config=config,
        facts=facts,
        steps=read_lines(folder / "metrics.jsonl"),
        held_out=read_lines(folder / "evaluation.jsonl"),
        answers=read_lines(folder / "answers.jsonl"),
        device=_json(folder / DEVICE),
        skipped=[line for path in sorted(folder.glob("skipped-rank*.jsonl")) for line in read_lines(path)],
        checkpoints={
            path.name: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in checkpoints
        },
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log that tell a step; without the half line that a kill can leave."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            found.append(record)
    return found


def _model_facts(directory: Path) -> dict[str, Any] | None:
    for name in MODEL_FACTS:
        if facts := _mapping(_json(directory / name), "made_from"):
            return facts
    return None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _mapping(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key)
    return value if isinstance(value, dict) else {}
