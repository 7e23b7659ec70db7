"""Faults in the data of a run, through the command line: counted over a stop and a resumption, or one sentence."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from runs import make_run, metrics, mmit, start_and_wait_for_step

from mmit.data.shard_set import open_source

pytestmark = pytest.mark.slow

BROKEN = ("tiny/00000003", "tiny/00000021", "tiny/00000042")


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank; three of its samples have a picture whose pixels are damaged, which their headers hide."""
    path = make_run(tmp_path_factory.mktemp("faults"), launch={"cpu_ranks": 1, "threads_per_rank": 1})
    shards = open_source(path.parent / "shards")
    numbers = {shards.read_text(n).id: n for n in range(len(shards))}
    for name in BROKEN:
        damage(path.parent / "shards" / "shard-000000.tar", shards.read(numbers[name]).images[0])
    for index in path.parent.glob("shards/*.idx.npy"):
        index.unlink()
    return path


def damage(tar: Path, image: bytes) -> None:
    content = tar.read_bytes()
    start, end = content.index(image) + image.index(b"IDAT") + 4, content.index(image) + len(image)
    tar.write_bytes(content[:start] + bytes(end - start) + content[end:])


def test_broken_samples_are_counted_through_a_stop_into_the_checkpoint_and_the_model(run_file: Path) -> None:
    words = ("train", str(run_file), "--stage", "align", "stages.align.data.max_skipped=0.3")
    folder = run_file.parent / "run" / "align"
    started = start_and_wait_for_step(folder, 14, *words)
    started.send_signal(signal.SIGTERM)
    output = started.communicate(timeout=60)[0]
    assert started.returncode == 75, output
    stopped = metrics(folder)[-1]
    assert stopped["skipped_in_all"] > 0
    newest = max(folder.glob("checkpoints/step-*"))
    assert json.loads((newest / "state.json").read_text())["skipped"] == {"tiny": stopped["skipped_in_all"]}

    done = mmit(*words)
    assert done.returncode == 0, done.stderr
    assert f"skipped before step {stopped['step'] + 1}: {stopped['skipped_in_all']} (tiny" in done.stderr
    assert "skipped in all: 12 (tiny 12)" in done.stderr  # three samples in each of four epochs
    steps = metrics(folder)
    assert [line["skipped_in_all"] for line in steps] == np.cumsum([line["skipped"] for line in steps]).tolist()
    lines = [json.loads(line) for line in (folder / "skipped-rank0.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    assert {(line["source"], line["id"]) for line in lines} == {("tiny", name) for name in BROKEN}
    made_from = json.loads((folder / "model" / "mmit.json").read_text())["made_from"]
    assert made_from["skipped"] == {"tiny": 12}
    assert made_from["left_out"] == {}
