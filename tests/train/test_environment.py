"""What is said of a machine, and the script for SLURM."""

import json
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmit.cli import app
from mmit.config import load_config
from mmit.errors import ConfigError
from mmit.train.environment import _advice
from mmit.train.slurm import Cluster, batch_script

RUN = Path(__file__).parents[2] / "configs" / "llava15_7b.yaml"
CLUSTER = Cluster(nodes=2, ranks_per_node=4, time="1:00:00", cpus_per_rank=6, devices=True, options=["--partition=a"])


def test_doctor_prints_json_with_versions_and_advice() -> None:
    found = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).output)
    assert found["packages"]["torch"]
    assert "pytest" not in found["packages"]  # what only development needs is no part of a report
    assert found["extras"]["serve"] == "installed"
    assert found["backends"]["gloo"] is True
    assert isinstance(found["advice"], list)


def test_little_shared_memory_and_few_files_are_advised_upon() -> None:
    advice = " ".join(
        _advice(
            [], {"shared_gib": 0.06}, {"here_gib": 99.0, "cache_gib": 1.0}, {"open_files": 1024}, {"serve": "lacks x"}
        )
    )
    for word in ("/dev/shm has 0.06 GiB", "ulimit -n", "1.0 GiB are free in the cache folder", "mmit[serve]"):
        assert word in advice
    assert "current folder" not in advice


def test_the_batch_script_is_shell_and_names_every_stage(tmp_path: Path) -> None:
    text = batch_script(load_config(RUN), Path("my runs/a.yaml"), ["seed=1"], CLUSTER)
    script = tmp_path / "job.sh"
    script.write_text(text)
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "#SBATCH --gpus-per-node=4" in text
    assert "mmit train 'my runs/a.yaml' seed=1 --stage" in text
    assert text.rstrip().endswith("train align\ntrain instruct")


def test_an_option_that_would_break_out_of_its_line_is_refused() -> None:
    evil = Cluster(nodes=1, ranks_per_node=1, time="1:00", cpus_per_rank=1, devices=False, options=["--a\nrm -rf x"])
    with pytest.raises(ConfigError, match="option of sbatch"):
        batch_script(load_config(RUN), RUN, [], evil)
