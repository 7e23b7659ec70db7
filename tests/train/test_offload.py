"""What may be offloaded where, and what this machine cannot do is refused with a sentence before a part is read."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.swap_tensor import partitioned_param_swapper
from pydantic import ValidationError

from mmit.config import Zero
from mmit.errors import ConfigError
from mmit.train import nvme
from mmit.train.deepspeed_settings import deepspeed_config
from mmit.train.engine import resolve_precision

BUILDER = type(get_accelerator().create_op_builder("AsyncIOBuilder"))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"stage": 0, "offload_optimizer": "cpu"}, "offload_optimizer: cpu needs stage 1, 2 or 3"),
        ({"stage": 2, "offload_optimizer": "nvme", "nvme_path": "x"}, "offload_optimizer: nvme needs stage 3"),
        ({"stage": 2, "offload_parameters": "cpu"}, "offload_parameters: cpu needs stage 3"),
        ({"stage": 3, "offload_parameters": "nvme", "nvme_path": "x"}, "not offloaded to nvme, .* empties .* take cpu"),
        ({"stage": 3, "offload_optimizer": "nvme"}, "nvme_path: .* needs a folder"),
        ({"stage": 3, "offload_optimizer": "cpu", "nvme_path": "x"}, "nvme_path: nothing is offloaded to it"),
    ],
)
def test_what_cannot_be_offloaded_is_refused_in_the_run_file(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Zero(**keys)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"zero_optimization": {"round_robin_gradients": True}}, "could not be saved by parameter name"),
        ({"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}}, "could not be saved by parameter name"),
        ({"zero_optimization": {"offload_param": {"buffer_size": 5}}}, "needs zero.offload_parameters in the run file"),
        ({"fp16": {"enabled": True}}, "'fp16.enabled' is set by mmit"),
    ],
)
def test_extra_keys_that_would_hide_the_state_are_refused(extra: dict[str, Any], said: str) -> None:
    zero = Zero(stage=3, offload_optimizer="cpu", extra=extra)
    with pytest.raises(ConfigError, match=said):
        deepspeed_config(zero, dtype=torch.float32, rows_per_micro_batch=1, micro_batches=1, clip_norm=1.0)


def test_without_libaio_the_package_to_install_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BUILDER, "is_compatible", lambda self, verbose=False: False)
    zero = Zero(stage=3, offload_optimizer="nvme", nvme_path=str(tmp_path / "swap"))
    with pytest.raises(ConfigError, match=r"stages.a.zero: .*apt install g[+][+] ninja-build libaio-dev"):
        nvme.prepare(zero, where="stages.a.zero")
    assert not (tmp_path / "swap").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BUILDER, "is_compatible", lambda self, verbose=False: True)
    (tmp_path / "file").write_text("")
    zero = Zero(stage=3, offload_optimizer="nvme", nvme_path=str(tmp_path / "file" / "swap"))
    with pytest.raises(ConfigError, match=r"stages.a.zero.nvme_path: .*file/swap cannot be used"):
        nvme.prepare(zero, where="stages.a.zero")


def test_what_was_offloaded_is_taken_away(tmp_path: Path) -> None:
    own = tmp_path / "stage" / "zero_stage_3" / "optimizer" / "rank0"
    own.mkdir(parents=True)
    (own / "1.tensor.swp").write_text("x")
    nvme.remove(Zero(stage=3, offload_optimizer="nvme", nvme_path=str(tmp_path / "stage")))
    assert list(tmp_path.iterdir()) == []


def test_deepspeed_empties_the_folder_of_parameters_with_every_part_that_it_partitions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why parameters are not offloaded to NVMe; every ``zero.Init`` makes such a swapper."""
    monkeypatch.setattr(partitioned_param_swapper.dist, "get_rank", lambda: 0)
    of_a_part_before = tmp_path / "zero_stage_3" / "float32params" / "rank0" / "0_param.tensor.swp"
    of_a_part_before.parent.mkdir(parents=True)
    of_a_part_before.write_bytes(b"weights")
    swapper = object.__new__(partitioned_param_swapper.AsyncPartitionedParameterSwapper)
    swapper.dtype = torch.float32
    folder = SimpleNamespace(zero_config=SimpleNamespace(offload_param=SimpleNamespace(nvme_path=str(tmp_path))))
    with pytest.raises(AttributeError, match="aio_config"):  # it goes on to async_io, which need not build here
        swapper._configure_aio(folder)
    assert not of_a_part_before.exists()


def test_fp16_is_refused_where_the_device_does_not_compute_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: None)
    with pytest.raises(ConfigError, match=r"precision: .* set it to bf16 or fp32"):
        resolve_precision("fp16")
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    assert resolve_precision("fp16") is torch.float16
