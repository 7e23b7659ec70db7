"""A batch script for SLURM that one can read: one task per rank, stages in order, requeued when it was asked to stop.

No launcher stands between SLURM and the ranks: ``srun`` starts one process per device, and its signals reach each rank,
which saves and ends with exit code 75.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmit.config import RunConfig
from mmit.errors import EXIT_INTERRUPTED, ConfigError


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What is asked of SLURM: nodes, ranks on each, time as SLURM writes it, further ``#SBATCH`` options as written.

    devices: ask for as many GPUs as ranks on each node; False for CPU ranks.
    """

    nodes: int
    ranks_per_node: int
    time: str
    cpus_per_rank: int
    devices: bool
    options: Sequence[str]


def batch_script(config: RunConfig, file: Path, overrides: Sequence[str], cluster: Cluster) -> str:
    """The script that trains every stage of a run file. Raises ConfigError for an option that is none."""
    for option in cluster.options:
        if not option.startswith("--") or "\n" in option:
            raise ConfigError(f"--option {option!r}: an option of sbatch begins with --, such as --partition=gpu")
    wanted = [
        f"--job-name={config.name}",
        f"--nodes={cluster.nodes}",
        f"--ntasks-per-node={cluster.ranks_per_node}",
        f"--cpus-per-task={cluster.cpus_per_rank}",
        *([f"--gpus-per-node={cluster.ranks_per_node}"] if cluster.devices else []),
        f"--time={cluster.time}",
        "--signal=TERM@180",
        "--requeue",
        "--output=%x-%j.log",
        *cluster.options,
    ]
    command = shlex.join(["mmit", "train", str(file), *overrides])
    stages = "\n".join(f"train {shlex.quote(stage)}" for stage in config.stages)
    return f"""#!/bin/bash
# Trains the stages {", ".join(config.stages)} of {file.name}. Submit with: sbatch THIS_FILE
# Three minutes before the time is over SLURM sends SIGTERM; the ranks save, and the job is queued again to go on.
{chr(10).join(f"#SBATCH {option}" for option in wanted)}
set -u

export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS={cluster.cpus_per_rank}

train() {{
    # one task of srun is one rank
    srun --kill-on-bad-exit=1 bash -c '
        export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
        exec "$@"' rank {command} --stage "$1"
    code=$?
    if [ $code -eq {EXIT_INTERRUPTED} ]; then
        echo "stage $1 was asked to stop and has saved; queueing the job again"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    [ $code -eq 0 ] || exit $code
}}

{stages}
"""
