"""The loss of each source in the log of a run on two real ranks."""

from pathlib import Path

import pytest
import yaml
from runs import make_run, metrics, mmit

pytestmark = pytest.mark.slow


def test_the_log_tells_the_loss_of_each_source_and_training_stays_the_same(tmp_path: Path) -> None:
    run_file = make_run(tmp_path, records=30)
    run = yaml.safe_load(run_file.read_text())
    shards = run["stages"]["align"]["data"]["mix"][0]["shards"]
    run["stages"]["align"] |= {"max_steps": 3, "data": {"workers": 0, "control": "shuffle_image"}}
    run["stages"]["align"]["data"]["mix"] = [{"shards": shards, "subset": "first 40%"}, {"shards": shards, "limit": 15}]
    run_file.write_text(yaml.safe_dump(run))
    planned = mmit("data", "plan", str(run_file), "--stage", "align", "--ranks", "2")
    assert planned.returncode == 0, planned.stderr
    assert "tiny#1" in planned.stdout
    told = {}
    for by_source in ("true", "false"):
        words = (f"output={tmp_path}/{by_source}", f"stages.align.log.by_source={by_source}")
        done = mmit("train", str(run_file), "--stage", "align", *words)
        assert done.returncode == 0, done.stderr
        told[by_source] = metrics(tmp_path / by_source / "align")
    assert [line["loss"] for line in told["true"]] == [line["loss"] for line in told["false"]]
    assert all("loss_by_source" not in line for line in told["false"])
    for line in told["true"]:
        losses = line["loss_by_source"]
        assert losses.keys() == {"tiny#1", "tiny#2"}
        assert min(losses.values()) <= line["loss"] <= max(losses.values())
