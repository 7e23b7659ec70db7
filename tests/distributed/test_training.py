"""Whole runs through the command line on two real ranks: killed, stopped, resumed, started by DeepSpeed's launcher."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from ranks import free_port
from runs import environment, make_run, metrics, mmit, rank_processes, start_and_wait_for_step
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from mmit.batch import Batch
from mmit.models import load_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Losses vary by a tenth: with so low a bound many updates are left out as spikes, the first at step 9."""
    run_file = make_run(tmp_path_factory.mktemp("training"))
    run = yaml.safe_load(run_file.read_text())
    run["stages"]["align"]["spike"] = {"action": "skip", "factor": 1.01, "window": 8, "limit": 100}
    run["stages"]["align"]["log"] = {"update_ratio_every": 2}
    run_file.write_text(yaml.safe_dump(run, sort_keys=False))
    return run_file


@pytest.fixture(scope="module")
def aligned(run_file: Path) -> Path:
    """The align stage, trained without interruption on two ranks."""
    done = mmit("train", str(run_file), "--stage", "align")
    assert done.returncode == 0, done.stderr
    assert "vision_tower (frozen)" in done.stderr  # the table of what trains
    return run_file.parent / "run" / "align"


@pytest.fixture(scope="module")
def stopped(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the align stage on two ranks under ZeRO-2, which SIGTERM reached at step 2 or soon after."""
    output = tmp_path_factory.mktemp("stopped")
    started = start_and_wait_for_step(
        output / "align", 2, "train", str(run_file), f"output={output}", "--stage", "align"
    )
    started.send_signal(signal.SIGTERM)
    said = started.communicate(timeout=60)[0]
    assert started.returncode == 75, said
    step = metrics(output / "align")[-1]["step"]
    assert f"error: stage align: stopped, and saved at step {step} of " in said
    assert said.count("the same command continues it") == 1
    return output


def test_a_run_that_is_stopped_and_killed_equals_one_that_is_not(
    run_file: Path, aligned: Path, stopped: Path, tmp_path: Path
) -> None:
    """SIGTERM at step 2, kill -9 of one rank at step 6, then to the end: same samples, same losses, same bits."""
    words = ("train", str(run_file), f"output={tmp_path}", "--stage", "align")
    folder = tmp_path / "align"
    shutil.copytree(stopped / "align", folder)

    started = start_and_wait_for_step(folder, 6, *words)
    rank_processes(started)[1].kill()
    output = started.communicate(timeout=60)[0]
    assert started.returncode == 1, output
    assert f"rank 1 ended with SIGKILL; the same command continues from {folder / 'checkpoints' / 'step-'}" in output
    assert "Traceback" not in output  # of rank 0, whose collective breaks off

    done = mmit(*words)
    assert done.returncode == 0, done.stderr
    assert "continues from" in done.stderr
    whole, pieced = metrics(aligned), metrics(folder)
    told = ("step", "loss", "lr", "grad_norm", "samples_digest", "samples", "tokens", "trained_tokens")
    told += ("update_ratio", "spike")  # where there are any: the verdict goes on from the losses of before
    assert len(whole) > 15
    assert [{key: line.get(key) for key in told} for line in pieced] == [
        {key: line.get(key) for key in told} for line in whole
    ]
    # judged by the eight before it, some of which were before the kill
    assert next(line["step"] for line in whole if line.get("spike") == "skip") == 9
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (folder, aligned))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.long
def test_kill_minus_nine_of_everything_leaves_no_rank_behind_and_a_damaged_checkpoint_is_set_aside(
    run_file: Path, tmp_path: Path
) -> None:
    words = ("train", str(run_file), f"output={tmp_path}", "--stage", "align", "stages.align.epochs=400")
    words += ("stages.align.spike.limit=100000",)
    folder = tmp_path / "align"
    started = start_and_wait_for_step(folder, 5, *words)
    second = mmit(*words)  # two of the same at once
    assert (second.returncode, "is being trained by another process" in second.stderr) == (2, True), second.stderr
    assert second.stderr.count("error: ") == 1
    ranks = rank_processes(started)
    started.kill()
    started.communicate()
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert alive == []

    newest, *_ = checkpoints = sorted((folder / "checkpoints").glob("step-*"), reverse=True)
    state = newest / "engine" / "rank-00001.safetensors"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1  # one bit: the size stays
    state.write_bytes(content)
    started = start_and_wait_for_step(folder, metrics(folder)[-1]["step"] + 1, *words)
    started.send_signal(signal.SIGTERM)
    output = started.communicate(timeout=60)[0]
    assert started.returncode == 75, output
    assert f"{newest}: engine/rank-00001.safetensors is not as it was written" in output
    assert f"continues from {checkpoints[1]}" in output
    assert (folder / "checkpoints" / f".{newest.name}.damaged").is_dir()
    steps = [line["step"] for line in metrics(folder)]
    assert steps == list(range(1, len(steps) + 1))


def test_a_run_goes_on_with_other_ranks_zero_stages_and_micro_batches(
    run_file: Path, aligned: Path, stopped: Path, tmp_path: Path
) -> None:
    """Two ranks under ZeRO-2, one rank without ZeRO, two ranks under ZeRO-3 with rows two by two."""
    words = ["train", str(run_file), f"output={tmp_path}", "--stage", "align"]
    folder = tmp_path / "align"
    shutil.copytree(stopped / "align", folder)
    started = start_and_wait_for_step(folder, 8, *words, "--ranks", "1", "stages.align.zero.stage=0")
    started.send_signal(signal.SIGTERM)
    output = started.communicate(timeout=60)[0]
    assert started.returncode == 75, output
    done = mmit(*words, "stages.align.zero.stage=3", "stages.align.batch.rows_per_micro_batch=2")
    assert done.returncode == 0, done.stderr
    assert "which 1 ranks wrote under ZeRO-0" in done.stderr
    whole, pieced = metrics(aligned), metrics(folder)
    told = ("step", "lr", "samples_digest", "samples", "tokens", "trained_tokens")
    assert [{key: line[key] for key in told} for line in pieced] == [{key: line[key] for key in told} for line in whole]
    # fp32: sums in another order, over some twenty steps
    assert [line["loss"] for line in pieced] == pytest.approx([line["loss"] for line in whole], rel=1e-5)
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (folder, aligned))
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in theirs) < 1e-5


def test_a_rank_that_stalls_ends_the_run_with_its_name_its_shard_and_its_sample(run_file: Path, tmp_path: Path) -> None:
    words = ("train", str(run_file), f"output={tmp_path}", "--stage", "align", "launch.stall_seconds=5")
    started = start_and_wait_for_step(tmp_path / "align", 4, *words, "stages.align.epochs=400")
    readers = [child for child in rank_processes(started)[1].children() if child.status() != psutil.STATUS_ZOMBIE]
    for reader in readers:  # as a disk that does not answer
        reader.suspend()
    before = time.monotonic()
    code = started.wait(timeout=60)
    seconds = time.monotonic() - before
    for reader in readers:
        reader.kill()
    output = started.communicate(timeout=60)[0]
    assert (code, seconds < 30) == (1, True), output
    named = r"error: rank 1 on \S+ has stalled: reading step \d+ for [5-9] s \(.*shard-\d+\.tar: \w+"
    assert re.search(named, output), output


def test_every_sample_is_seen_as_often_as_planned(aligned: Path) -> None:
    assert sum(line["samples"] for line in metrics(aligned)) == 60 * 4  # samples x epochs


def test_only_the_connector_moved_in_align(run_file: Path, aligned: Path) -> None:
    start = load_file(run_file.parent / "parts" / "llama" / "model.safetensors")
    trained = load_file(aligned / "model" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(trained[f"language_model.{name}"], start[name])


def test_old_checkpoints_are_removed_and_those_kept_are_complete(aligned: Path) -> None:
    found = sorted(path.name for path in (aligned / "checkpoints").iterdir())
    assert len(found) == 2
    assert all((aligned / "checkpoints" / name / "COMPLETE").is_file() for name in found)


def test_a_complete_stage_is_not_trained_again(run_file: Path, aligned: Path) -> None:
    before = (aligned / "model" / "model.safetensors").stat().st_mtime_ns
    done = mmit("train", str(run_file), "--stage", "align")
    assert "stage align: complete" in done.stderr
    assert (aligned / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_a_complete_stage_of_an_edited_run_file_is_not_taken_for_the_new_one(run_file: Path, aligned: Path) -> None:
    assert aligned.is_dir()
    done = mmit("train", str(run_file), "--stage", "align", "stages.align.train.connector=2e-2")
    assert done.returncode == 2
    assert "stages.align.train.connector was 0.01 and is 0.02" in done.stderr


def test_deepspeeds_own_launcher_trains_the_next_stage_from_a_hostfile(run_file: Path, aligned: Path) -> None:
    launcher = Path(sys.executable).parent / "deepspeed"
    hosts = run_file.parent / "hosts"
    hosts.write_text("localhost slots=2\n")
    words = [str(launcher), "--hostfile", str(hosts), "--no_ssh", "--node_rank", "0", "--master_addr", "127.0.0.1"]
    words += ["--master_port", str(free_port()), "--module", "mmit"]
    words += ["train", str(run_file), "--stage", "instruct"]
    done = subprocess.run(
        words,
        env={**environment(), "DS_ACCELERATOR": "cpu", "PATH": f"{launcher.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    folder = run_file.parent / "run" / "instruct"
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3]
    before, after = (load_file(path / "model" / "model.safetensors") for path in (aligned, folder))
    moved = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert moved == {"language_model", "multi_modal_projector"}
    opened: Any = LlavaForConditionalGeneration.from_pretrained(folder / "model", output_loading_info=True)
    theirs, report = opened
    assert (report["missing_keys"], report["unexpected_keys"]) == (set(), set())
    ours = load_model(folder, dtype=torch.float32).model
    ids = torch.arange(5, 25).view(1, -1)
    batch = Batch(
        input_ids=ids,
        position_ids=torch.arange(20).view(1, -1),
        labels=ids,
        pixels=torch.zeros((0, 3, *ours.spec.size), dtype=torch.uint8),
        trained_tokens=20,
        sample_ids=("a",),
        tokens=20,
    )
    with torch.no_grad():
        # the same arithmetic in fp32; attention kernels may sum in another order
        torch.testing.assert_close(ours.logits(batch), theirs(input_ids=ids).logits, rtol=0, atol=1e-4)


@pytest.mark.long
def test_bf16_trains_under_zero_2(run_file: Path, tmp_path: Path) -> None:
    changes = (f"output={tmp_path}", "precision=bf16", "stages.align.max_steps=2", "stages.align.log.tensorboard=true")
    done = mmit("train", str(run_file), *changes, "--stage", "align")
    assert done.returncode == 0, done.stderr
    weights = load_file(tmp_path / "align" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert list((tmp_path / "align" / "tensorboard").glob("events*"))


def test_a_loss_that_is_not_finite_ends_the_run_with_a_sentence(run_file: Path, tmp_path: Path) -> None:
    changes = (f"output={tmp_path}", "stages.align.train.connector=1e30")
    done = mmit("train", str(run_file), *changes, "--stage", "align", "--ranks", "1")
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 0
    assert "Lower the learning rate" in done.stderr
    assert not (tmp_path / "align" / "model").exists()


def test_a_full_disk_during_a_checkpoint_ends_the_run_and_leaves_nothing_half_written(
    run_file: Path, tmp_path: Path
) -> None:
    """Files may not grow beyond 64 KiB, as on a disk that is full: the weights alone are larger."""
    done = mmit(
        "train",
        str(run_file),
        f"output={tmp_path}",
        "--stage",
        "align",
        "--ranks",
        "1",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)),
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("Traceback") == 0
    assert "the checkpoint was not written" in done.stderr
    assert list((tmp_path / "align" / "checkpoints").iterdir()) == []
