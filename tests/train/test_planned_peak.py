"""What ``mmit plan`` predicts is what PyTorch's allocator hands out while a stage trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from model_factories import tiny_model_section
from plan_memory import ALLOWED, predicted_and_measured

from mmit.config import load_config


@pytest.fixture(scope="module")
def section(one_rank: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A toy model, on the one rank of a process group."""
    return tiny_model_section(tmp_path_factory.mktemp("peak"))


@pytest.mark.parametrize(("number", "recompute"), [(0, False), (2, True)])
def test_the_predicted_peak_is_the_measured_one(
    section: dict[str, Any], tmp_path: Path, number: int, *, recompute: bool
) -> None:
    buckets = {"zero_optimization": {"reduce_bucket_size": 20_000}}
    stage = {
        "train": {"connector": 1e-3, "language_model": 1e-3},
        "data": {"mix": [{"shards": "none"}]},
        "batch": {"length": 512, "tokens_per_step": 1024},
        "zero": {"stage": number, "extra": buckets},
        "activation_checkpointing": recompute,
    }
    content = {"name": "r", "precision": "fp32", "model": section, "stages": {"measured": stage}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    found = predicted_and_measured(load_config(tmp_path / "run.yaml"))
    assert found["predicted"] == pytest.approx(found["measured"], rel=ALLOWED), found
