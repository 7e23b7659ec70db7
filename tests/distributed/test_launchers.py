"""Runs started by others: SLURM's script on a stand-in for srun, and torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from runs import environment, make_run, metrics, mmit

pytestmark = pytest.mark.slow

SRUN = """#!/bin/bash
# two tasks at once, as SLURM starts them; the exit code is the highest
while [[ $1 == --* ]]; do shift; done
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 "$@" & tasks[task]=$!
done
code=0
for task in ${tasks[@]}; do wait $task; last=$?; (( last > code )) && code=$last; done
exit $code
"""
SCONTROL = """#!/bin/bash
[ "$1 $2" == "show hostnames" ] && echo 127.0.0.1 && echo other-host
[ "$1" == requeue ] && echo "requeued $2"
exit 0
"""


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("launchers"), records=8)


def test_slurms_script_trains_every_stage_and_torchrun_trains_one(run_file: Path, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    few = ("stages.align.max_steps=2", "stages.instruct.max_steps=1")
    both = yaml.safe_load(run_file.read_text())
    run_file.write_text(yaml.safe_dump(both | {"stages": {"align": both["stages"]["align"]}}))
    options = ("--nodes", "1", "--ranks-per-node", "2", "--cpus-per-rank", "1", "--cpu", "--option=--partition=tiny")
    written = mmit("launch", str(run_file), few[0], "--slurm", str(script), *options)
    assert written.returncode == 0, written.stderr
    text = script.read_text()
    assert "#SBATCH --partition=tiny" in text
    assert "gpus-per-node" not in text
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    surroundings = environment() | {
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "host[1-2]",
    }
    done = subprocess.run(
        ["bash", str(script)], env=surroundings, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in metrics(run_file.parent / "run" / "align")] == [1, 2]
    made = json.loads((run_file.parent / "run" / "align" / "model" / "mmit.json").read_text())["made_from"]
    assert made["ranks"] == 2

    run_file.write_text(yaml.safe_dump(both))

    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2"]
    words = ["-m", "mmit", "train", str(run_file), *few, "--stage", "instruct", f"output={tmp_path / 'again'}"]
    words.append(f"stages.instruct.init_from={run_file.parent / 'run' / 'align'}")
    done = subprocess.run(
        [*torchrun, *words], env=environment(), capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in metrics(tmp_path / "again" / "instruct")] == [1]
