"""A stage that makes and reads features on two ranks, killed and continued."""

from pathlib import Path

import pytest
import torch
from runs import make_run, metrics, mmit, rank_processes, start_and_wait_for_step
from safetensors.torch import load_file

from mmit.models import load_model

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_two_ranks_make_features_train_without_a_tower_and_go_on_after_kill_minus_nine(tmp_path: Path) -> None:
    run_file = make_run(tmp_path)
    words = ["train", str(run_file), "--stage", "align", "stages.align.zero.stage=3", "stages.align.max_steps=9"]
    words += [f"stages.align.data.features={tmp_path / 'features'}", "stages.align.data.missing_features=compute"]
    folder = tmp_path / "run" / "align"
    started = start_and_wait_for_step(folder, 6, *words)
    seen = {line["step"]: line for line in metrics(folder)}
    rank_processes(started)[1].kill()
    output = started.communicate(timeout=60)[0]
    assert "samples with pictures: what" in output
    assert "the vision tower is not loaded: features of" in output
    assert len(list((tmp_path / "features").glob("*.features"))) == 2  # each rank wrote a file of its own

    done = mmit(*words)
    assert done.returncode == 0, done.stderr
    assert "samples with pictures: what" not in done.stderr  # all are there
    assert "continues from" in done.stderr
    again = {line["step"]: line for line in metrics(folder)}
    assert sorted(again) == list(range(1, 10))
    told = ("loss", "grad_norm", "samples_digest", "images", "tokens")
    repeated = [step for step in seen if step > 4]  # after the checkpoint
    assert repeated
    assert all(again[step][key] == seen[step][key] for step in repeated for key in told)

    written = load_file(folder / "model" / "model.safetensors")
    tower = load_file(tmp_path / "parts" / "clip" / "model.safetensors")
    ours = {name.split("vision_model.")[1]: value for name, value in written.items() if "vision_tower" in name}
    theirs = {name.removeprefix("vision_model."): value for name, value in tower.items()}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    load_model(folder, dtype=torch.float32)
    assert not (folder / "vision_tower.safetensors").exists()
