"""What ``mmit plan`` predicts is what PyTorch's allocator hands out while a stage trains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from model_factories import tiny_model_section
from plan_memory import ALLOWED, predicted_and_measured
from ranks import free_port

from mmit.config import load_config
from mmit.train.engine import init_process_group


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A toy model, on the one rank of a process group."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
            patch.setenv(name, value)
        patch.setenv("MASTER_PORT", str(free_port()))
        init_process_group()
        yield tiny_model_section(tmp_path_factory.mktemp("peak"))
        torch.distributed.destroy_process_group()


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
