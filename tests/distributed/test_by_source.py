"""The loss of each source in the log of a run on two real ranks, and of held-out samples."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from runs import make_run, metrics, mmit

from mmit.data import open_source
from mmit.evaluate.losses import answer_loss
from mmit.models import load_model

pytestmark = pytest.mark.slow


def test_the_log_tells_the_loss_of_each_source_and_training_stays_the_same(tmp_path: Path) -> None:
    run_file = make_run(tmp_path, records=30)
    run = yaml.safe_load(run_file.read_text())
    shards = run["stages"]["align"]["data"]["mix"][0]["shards"]
    run["stages"]["align"] |= {"max_steps": 3, "data": {"workers": 0, "control": "shuffle_image"}}
    run["stages"]["align"]["data"]["mix"] = [{"shards": shards, "subset": "first 40%"}]
    run["stages"]["align"]["data"]["mix"].append({"shards": shards, "subset": "first 80%", "limit": 15})
    held_out = [{"shards": shards, "subset": "last 20%"}]
    run_file.write_text(yaml.safe_dump(run))
    planned = mmit("data", "plan", str(run_file), "--stage", "align", "--ranks", "2")
    assert planned.returncode == 0, planned.stderr
    assert "tiny#1" in planned.stdout
    told = {}
    for by_source in ("true", "false"):
        words = [f"output={tmp_path}/{by_source}", f"stages.align.log.by_source={by_source}"]
        if by_source == "true":
            asked = {"mix": held_out, "every_steps": 2, "visual_gain": True}
            words.append(f"stages.align.evaluate={json.dumps(asked)}")
        done = mmit("train", str(run_file), "--stage", "align", *words)
        assert done.returncode == 0, done.stderr
        told[by_source] = metrics(tmp_path / by_source / "align")
    for key in ("loss", "grad_norm", "samples_digest"):
        assert [line[key] for line in told["true"]] == [line[key] for line in told["false"]]
    assert all("loss_by_source" not in line for line in told["false"])
    for line in told["true"]:
        losses = line["loss_by_source"]
        assert losses.keys() == {"tiny#1", "tiny#2"}
        assert min(losses.values()) <= line["loss"] <= max(losses.values())
    folder = tmp_path / "true" / "align"
    held = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in held] == [2, 3]  # every two steps, and at the end
    source = open_source(shards)
    samples = [source.read(number) for number in range(24, 30)]
    # the mean over the tokens of both ranks is that of one process which reads the model; fp32, another order of sums
    alone = answer_loss(load_model(folder / "model", dtype=torch.float32), samples, "true")
    assert held[-1]["loss"] == pytest.approx(alone, rel=1e-5)
    assert held[-1]["visual_gain"].keys() == {"blank", "other"}
    assert not (tmp_path / "false" / "align" / "evaluation.jsonl").exists()
