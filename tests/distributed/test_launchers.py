"""Runs started by others: SLURM's script on a stand-in for srun, and torchrun."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from hosts import two_hosts, why_no_hosts
from runs import environment, make_run, metrics, mmit, wait_for_step

pytestmark = pytest.mark.slow

PLAN = ("stages.align.epochs=400", "stages.align.optim.schedule=constant", "stages.align.optim.warmup_fraction=0")
"""A long plan, whose first steps are the same whether it ends early or not."""

NO_HOSTS = why_no_hosts()

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


@pytest.fixture(scope="module")
def by_slurm(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The script that was written for SLURM; it has trained ``align`` for two steps on two ranks."""
    folder = tmp_path_factory.mktemp("slurm")
    script = folder / "job.sh"
    both = yaml.safe_load(run_file.read_text())
    alone = run_file.with_name("align.yaml")
    alone.write_text(yaml.safe_dump(both | {"stages": {"align": both["stages"]["align"]}}))
    options = ("--nodes", "1", "--ranks-per-node", "2", "--cpus-per-rank", "1", "--cpu", "--option=--partition=tiny")
    written = mmit("launch", str(alone), *PLAN, "stages.align.max_steps=2", "--slurm", str(script), *options)
    assert written.returncode == 0, written.stderr
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)
    surroundings = environment() | {
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "host[1-2]",
    }
    done = subprocess.run(
        ["bash", str(script)], env=surroundings, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    return script.read_text()


def test_slurms_script_trains_every_stage(run_file: Path, by_slurm: str) -> None:
    assert "#SBATCH --partition=tiny" in by_slurm
    assert "gpus-per-node" not in by_slurm
    assert [line["step"] for line in metrics(run_file.parent / "run" / "align")] == [1, 2]
    made = json.loads((run_file.parent / "run" / "align" / "model" / "mmit.json").read_text())["made_from"]
    assert made["ranks"] == 2


def test_torchrun_trains_a_stage(run_file: Path, by_slurm: str, tmp_path: Path) -> None:
    assert by_slurm
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2"]
    words = ["-m", "mmit", "train", str(run_file), "stages.instruct.max_steps=1", "--stage", "instruct"]
    words += [f"output={tmp_path}", f"stages.instruct.init_from={run_file.parent / 'run' / 'align'}"]
    done = subprocess.run(
        [*torchrun, *words], env=environment(), capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in metrics(tmp_path / "instruct")] == [1]


@pytest.mark.long
@pytest.mark.skipif(NO_HOSTS != "", reason=f"this machine gives no network namespaces: {NO_HOSTS}")
def test_torchrun_trains_on_two_hosts_and_when_the_cable_is_pulled_each_ends_and_names_the_other(
    run_file: Path, by_slurm: str, tmp_path: Path
) -> None:
    """The losses are those of two ranks on one host."""
    assert by_slurm
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "host-a:29500", "--nnodes", "2", "--nproc_per_node", "1"]
    words = [str(Path(sys.executable).parent / "torchrun"), *rendezvous, "-m", "mmit", "train", str(run_file), *PLAN]
    words += ["--stage", "align", f"output={tmp_path / 'run'}", "launch.stall_seconds=5"]
    folder = tmp_path / "run" / "align"
    logs = [tmp_path / "host-a.log", tmp_path / "host-b.log"]
    named = ["rank 1 on host-b has not been heard", "rank 0 on host-a has not been heard"]

    def said() -> list[bool]:
        return [sentence in log.read_text() for log, sentence in zip(logs, named, strict=True)]

    agents: list[subprocess.Popen[str]] = []
    try:
        with two_hosts(tmp_path) as hosts:
            agents += [host.start(words, environment(), log) for host, log in zip(hosts, logs, strict=True)]
            wait_for_step(folder, 3, agents[0])
            hosts[1].cut()
            before = time.monotonic()
            while not all(said()) and time.monotonic() < before + 30:
                time.sleep(0.1)
    finally:
        for agent in agents:  # torchrun's own agents wait for each other a minute longer
            for process in psutil.Process(agent.pid).children(recursive=True):
                process.kill()
            agent.kill()
            agent.wait()
    assert said() == [True, True], [log.read_text()[-2000:] for log in logs]
    here, there = (metrics(path)[:2] for path in (run_file.parent / "run" / "align", folder))
    told = ("step", "loss", "lr", "grad_norm", "samples_digest", "tokens")
    assert [[line[key] for key in told] for line in there] == [[line[key] for key in told] for line in here]
    assert [line["step"] for line in here] == [1, 2]
