"""A whole stage in fp16, continued; and a language model of the hub that has changed there in the meantime."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from ranks import run_ranks
from runs import make_run
from safetensors.torch import load_file, save_file

NAME = "someone/tiny-llm"
OLD, NEW = "a" * 40, "b" * 40

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("fp16")
    path, home = make_run(folder, records=30), folder / "home"
    run = yaml.safe_load(path.read_text())
    cached = home / "hub" / "models--someone--tiny-llm"
    for revision in (OLD, NEW):
        shutil.copytree(run["model"]["language_model"]["path"], cached / "snapshots" / revision)
    file = cached / "snapshots" / NEW / "model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(OLD)
    run["model"]["language_model"]["path"] = NAME
    run["precision"] = "fp16"
    # the scale starts so high that the first steps overflow
    zero = {"stage": 2, "extra": {"fp16": {"initial_scale_power": 20, "hysteresis": 1}}}
    run["stages"]["align"] |= {"max_steps": 5, "save": {"every_steps": 2, "keep_last": 9}, "zero": zero}
    path.write_text(yaml.safe_dump(run))
    return run_ranks(Path(__file__).parent / "fp16_from_hub.py", str(path), str(home), ranks=1)


def test_a_stage_in_fp16_leaves_out_what_overflows_and_trains(result: Any) -> None:
    scales = [line["loss_scale"] for line in result["whole"]]
    assert [line["step"] for line in result["whole"]] == [1, 2, 3, 4, 5]
    assert scales[0] == 2.0**19  # of the next step: the first overflowed
    left_out = result["whole"][-1]["left_out_in_all"]
    assert scales[-1] == 2.0 ** (20 - left_out)
    assert [line["grad_norm"] is None for line in result["whole"]].count(True) == left_out < 5


def test_what_a_stage_read_from_the_hub_is_kept_and_read_again_after_the_newest_has_changed(result: Any) -> None:
    assert result["revisions"] == {NAME: OLD}
    assert f"{NAME}: revision {OLD[:12]} of the hub, as when this began" in result["log"]
    assert result["continued"] == result["whole"]
    assert result["same_bits"]
