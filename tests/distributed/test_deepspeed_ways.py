"""Every way of DeepSpeed gives the steps of plain torch, from the start and from another way's checkpoint.

``python tests/distributed/test_deepspeed_ways.py`` prints the table of docs/deepspeed.md.
"""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent.parent)]

import pytest
import yaml
from ranks import run_ranks
from runs import make_run
from transformers import AutoModelForCausalLM, LlamaConfig

from mmit.config import Zero
from mmit.errors import ConfigError
from mmit.train import nvme
from mmit.train.nvme import can_build

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "deepspeed_ways.py"

IN_MEMORY = [
    "ZeRO-0",
    "ZeRO-1",
    "ZeRO-2",
    "ZeRO-3",
    "ZeRO-2, one micro-batch, small buckets",
    "ZeRO-2, optimizer on CPU",
    "ZeRO-3, optimizer on CPU",
    "ZeRO-3, parameters on CPU",
    "ZeRO-3, both on CPU",
    "ZeRO-3, sub-groups and thresholds",
    "ZeRO-2, rows shared by two ranks",
    "ZeRO-3, rows shared by two ranks",
    "bf16, ZeRO-0",
    "bf16, ZeRO-2",
    "bf16, ZeRO-3, both on CPU",
    "fp16, ZeRO-0",
    "fp16, ZeRO-2, optimizer on CPU",
    "fp16, ZeRO-3",
]
ON_DISK = [
    "ZeRO-3, optimizer on disk",
    "ZeRO-3, in memory",
    "ZeRO-3, optimizer on disk in sub-groups, parameters on CPU",
]

TOLERANCES = {
    # the order of fp32 sums; losses near 6, norms near 8, weights of up to 1
    "fp32": {"loss": 2e-6, "norm": 1e-6, "weights": 3e-7},
    # the same for norms of 3 million numbers, which torch and DeepSpeed add up in another order
    "disk": {"loss": 2e-6, "norm": 1e-5, "weights": 3e-7},
    # gradients of ranks and micro-batches are added in 8 bits of mantissa; a bit of a weight below 1 is 2**-8
    "bf16": {"loss": 2e-2, "norm": 5e-3, "weights": 2**-7},
    # the same in 11 bits
    "fp16": {"loss": 2e-3, "norm": 1e-3, "weights": 2**-10},
}


def tolerances_of(way: str) -> dict[str, float]:
    return TOLERANCES["disk" if way in ON_DISK else way[:4] if way[:4] in TOLERANCES else "fp32"]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("ways")
    return run_ranks(SCRIPT, str(make_run(folder, records=6)))


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What goes to disk, with a language model large enough that DeepSpeed moves it: 1 MiB on each rank."""
    return run_on_disk(tmp_path_factory.mktemp("disk"))


def run_on_disk(folder: Path) -> Any:
    path = make_run(folder, records=6)
    run = yaml.safe_load(path.read_text())
    language_model = Path(run["model"]["language_model"]["path"])
    config = LlamaConfig.from_pretrained(language_model)
    config.intermediate_size, config.num_hidden_layers = 16384, 1
    AutoModelForCausalLM.from_config(config).save_pretrained(language_model)
    return run_ranks(SCRIPT, str(path), str(folder / "nvme"))


@pytest.mark.parametrize("way", IN_MEMORY)
def test_three_steps_are_those_of_plain_torch(result: Any, way: str) -> None:
    check(result, way)


@pytest.mark.long
@pytest.mark.parametrize("way", ON_DISK)
def test_three_steps_are_those_of_plain_torch_with_what_lies_on_disk(request: Any, way: str) -> None:
    """Where DeepSpeed's async_io builds; where not, the way is refused."""
    if can_build():
        check(request.getfixturevalue("on_disk"), way)
    else:
        with pytest.raises(ConfigError, match="needs DeepSpeed's async_io, which does not build here"):
            nvme.prepare(Zero(stage=3, offload_optimizer="nvme", nvme_path="swap"), where="stages.a.zero")


def check(result: Mapping[str, Any], way: str) -> None:
    assert result["moved"] > 1e-2
    tolerances, found = tolerances_of(way), result[way]
    assert found["same bits"]  # of every weight, right after loading what another way saved
    assert found["steps"] == 2  # Adam's bias correction goes on counting in a run that continues another way's state
    assert {key: found[key] for key in tolerances if found[key] > tolerances[key]} == {}


def test_losses_in_half_precision_are_near_those_of_fp32(result: Any) -> None:
    losses = result["losses"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], abs=3e-2)
    assert losses["fp16"] == pytest.approx(losses["fp32"], abs=3e-3)


def test_a_step_that_overflows_in_fp16_is_left_out_counted_and_halves_the_scale(result: Any) -> None:
    # [loss, norm, scale of the next step, steps left out, steps of the optimizer]
    lines = result["overflowing"]["whole"]
    left_out = [line for line in lines if line[1] == "inf"]
    assert 1 <= len(left_out) <= 3
    for number, line in enumerate(left_out, start=1):
        assert line == [lines[0][0], "inf", 2.0 ** (15 - number), number, 0]
    first_made = lines[len(left_out)]
    assert first_made[0] == lines[0][0]
    assert first_made[3:] == [len(left_out), 1]
    assert lines[-1][0] < lines[0][0] - 0.3


def test_a_run_in_fp16_that_is_continued_keeps_its_loss_scale(result: Any) -> None:
    assert result["overflowing"]["in two"] == result["overflowing"]["whole"]


def table() -> str:
    """The ways as rows of markdown: measured differences, and in brackets what the test allows."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        found |= run_ranks(SCRIPT, str(make_run(Path(folder) / "memory", records=6)))
        names = list(IN_MEMORY)
        if can_build():
            found |= run_on_disk(Path(folder) / "disk")
            names += ON_DISK
    lines = ["| way | loss | norm of the gradient | weights |", "|---|---|---|---|"]
    for name in names:
        allowed = tolerances_of(name)
        cells = [f"{found[name][key]:.1e} ({allowed[key]:.0e})" for key in ("loss", "norm", "weights")]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
