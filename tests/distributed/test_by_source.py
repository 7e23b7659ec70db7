"""What a run on two real ranks tells while it trains, and that it trains the same bits when it tells nothing."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from runs import make_run, metrics, mmit
from safetensors.torch import load_file

from mmit.data import open_source
from mmit.evaluate.accuracy import ask_all
from mmit.evaluate.losses import answer_loss
from mmit.models import load_model

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_the_log_tells_losses_answers_and_updates_and_training_stays_the_same(tmp_path: Path) -> None:
    """Under ZeRO-3, where every weight of a forward pass comes from both ranks; the answers are three for two ranks."""
    run_file = make_run(tmp_path, records=30)
    run = yaml.safe_load(run_file.read_text())
    shards = run["stages"]["align"]["data"]["mix"][0]["shards"]
    partitioned = {"stage": 3, "extra": {"zero_optimization": {"stage3_param_persistence_threshold": 200}}}
    run["stages"]["align"] |= {"zero": partitioned, "max_steps": 3, "data": {"workers": 0, "control": "shuffle_image"}}
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
            asked = {"mix": held_out, "every_steps": 2, "visual_gain": True, "answers": 3, "answer_tokens": 5}
            words.append(f"stages.align.evaluate={json.dumps(asked | {'text': 'probe'})}")
            words += ["stages.align.save={keep_best: true}", f"stages.align.data.cache={tmp_path}/cache"]
            words += ["stages.align.log.mfu=true", "stages.align.log.update_ratio_every=2"]
            words += ["stages.align.spike={action: warn, window: 3}", "stages.align.log.tensorboard=true"]
        else:
            words.append("stages.align.log.update_ratio_every=0")
        done = mmit("train", str(run_file), "--stage", "align", *words)
        assert done.returncode == 0, done.stderr
        told[by_source] = metrics(tmp_path / by_source / "align")
    for key in ("loss", "grad_norm", "samples_digest"):
        assert [line[key] for line in told["true"]] == [line[key] for line in told["false"]]
    weights = [load_file(tmp_path / name / "align" / "model" / "model.safetensors") for name in ("true", "false")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])
    assert not {"loss_by_source", "flops", "mfu", "update_ratio"} & set().union(*told["false"])
    assert all(0 < line["mfu"] < 1 and line["flops"] > 0 for line in told["true"])
    assert ["update_ratio" in line for line in told["true"]] == [False, True, False]
    for line in told["true"]:
        losses = line["loss_by_source"]
        assert losses.keys() == {"tiny#1", "tiny#2"}
        assert min(losses.values()) <= line["loss"] <= max(losses.values())
    folder = tmp_path / "true" / "align"
    held = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in held] == [0, 2, 3]  # before, since text is watched; every two steps; at the end
    assert len({line["text_loss"] for line in held}) == 1  # only the connector trains, which text does not pass
    best_so_far = held[1]["loss"] < held[0]["loss"]
    assert (folder / "checkpoints" / "step-000002" / "COMPLETE").exists() == best_so_far
    source = open_source(shards)
    samples = [source.read(number) for number in range(24, 30)]
    # the mean over the tokens of both ranks is that of one process which reads the model; fp32, another order of sums
    alone = answer_loss(load_model(folder / "model", dtype=torch.float32), samples, "true")
    assert held[-1]["loss"] == pytest.approx(alone, rel=1e-5)
    assert held[-1]["visual_gain"].keys() == {"blank", "other"}
    assert not (tmp_path / "false" / "align" / "evaluation.jsonl").exists()
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [line["step"] for line in answers] == [2, 2, 2, 3, 3, 3]
    loaded = load_model(folder / "model", dtype=torch.float32)
    by_id = {sample.id: sample for sample in samples}
    asked = ask_all(loaded, [by_id[line["id"]] for line in answers[3:]], max_new_tokens=5)
    assert [(line["question"], line["reference"], line["answer"]) for line in answers[3:]] == [
        (one.question, one.expected, one.answer) for one in asked
    ]
    for line in answers:
        assert len(line["pictures"]) == len(by_id[line["id"]].images)
        assert all((folder / name).is_file() for name in line["pictures"])
