"""The GPU benchmark at toy size on the CPU: its operations, its isolation test, its arithmetic, one case."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import figures, markdown
from gpu_isolation import Isolation, kernels, try_kernel
from gpu_model import SHAPES, lengths, steps, work
from gpu_step import kind_of

from mmit.batch import IGNORE

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.parametrize(
    ("size", "stage", "tokens", "labels", "images", "teraflops"),
    [("7b", 1, 597, 20, 1.0, 16.2), ("0.5b", 2, 829, 140, 0.94, 2.34)],
)
def test_operations_of_a_sample_are_those_of_the_formulae(
    size: str, stage: int, tokens: int, labels: int, images: float, teraflops: float
) -> None:
    count = 100
    found = work(
        SHAPES[size],
        stage,
        tokens=count * tokens,
        squares=count * tokens**2,
        labels=count * labels,
        tiles=round(count * images),
    )
    # weights in the layers, 2 h^2 + 2 h kv + 3 h m in each; operations for each of them and token: 6, or 4 where frozen
    c, h, weights, layers, words = {
        "7b": (4, 4096, 32 * (4 * 4096**2 + 3 * 4096 * 11008), 32, 32000),
        "0.5b": (6, 896, 24 * (2 * 896**2 + 2 * 896 * 128 + 3 * 896 * 4864), 24, 151936),
    }[size]
    assert found["head"] == c * h * words * labels * count
    assert found["language model"] == count * (c * weights * tokens + 6 * layers * h * tokens**2)
    assert sum(found.values()) / count / 1e12 == pytest.approx(teraflops, rel=0.01)  # three digits


def test_steps_hold_whole_samples_and_count_no_padding() -> None:
    (step,) = steps(SHAPES["toy"], 2, length=128, rows=3, count=1)
    assert len(step) == 3
    assert lengths(step).sum() == sum(batch.tokens for batch in step)
    for batch in step:
        assert len(lengths([batch])) == len(batch.sample_ids)
        assert batch.trained_tokens == int((batch.labels != IGNORE).sum()) > 0


def test_each_kernel_keeps_samples_apart_or_says_why_it_cannot_run() -> None:
    assert {"mmit_packed", "sdpa", "flash_attention_2", "flex_attention"} <= set(kernels())
    for kernel in ("mmit_packed", "sdpa"):
        assert try_kernel(SHAPES["toy"], kernel, length=64, device="cpu", dtype=torch.float32).holds(torch.float32)
    refused = try_kernel(SHAPES["toy"], "flash_attention_2", length=64, device="cpu", dtype=torch.float32)
    assert "GPUs only" in refused.refused
    assert not refused.holds(torch.float32)


def test_kernels_are_told_by_their_names() -> None:
    assert kind_of("flash_fwd_kernel") == "attention"
    assert kind_of("sm90_xmma_gemm_bf16bf16_bf16f32") == "matrix products"
    assert kind_of("void at::native::(anonymous namespace)::multi_tensor_apply_kernel") == "optimizer"
    assert kind_of("Memcpy HtoD") == "copies and look-ups"
    assert kind_of("vectorized_layer_norm_kernel") == "element-wise and norms"


@pytest.mark.long
def test_a_case_runs_in_a_process_of_its_own_and_gives_a_report() -> None:
    asked: dict[str, Any] = {
        "size": "toy",
        "stage": 2,
        "length": 128,
        "rows": 2,
        "device": "cpu",
        "steps": 2,
        "warmup": 1,
    }
    asked["settings"] = {"activation_checkpointing": False}
    command = [sys.executable, "-W", "ignore", SCRIPT, "--case", json.dumps({"kind": "step", **asked})]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    case = asked | json.loads(done.stdout.splitlines()[-1])
    assert len(case["seconds"]) == 2
    assert set(case["flops"]) == {"tower", "connector", "language model", "head"}
    assert case["profile"]["kinds"]["matrix products"] > 0
    flops = sum(case["flops"].values())
    exact = {**case, "seconds": [1.0, 1.0], "samples": 10, "tokens": 200, "peak_bytes": 2**30}
    assert figures(exact, rate=flops) == {
        "samples_per_second": 5.0,
        "tokens_per_second": 100.0,
        "mfu": 0.5,
        "peak_gib": 1.0,
    }
    isolation = {"toy": [asdict(Isolation(kernel="k", refused="no such device")) | {"holds": False}]}
    told = markdown(
        {"device": "CPU", "torch": "2", "matrix_rate": float(flops), "isolation": isolation, "cases": [exact]}
    )
    assert "| toy | 2 | 128 | mmit_packed | no | 5.0 |  | 100 | 50.0% | 55% | 49% | 1.0 |" in told
    assert "| toy | k | no such device |" in told
