"""Adapters through the command line: a stage, one that goes on with its adapter in four bits, and the merged model."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import make_run, metrics, mmit
from safetensors.torch import load_file

from mmit.models import merge_directory

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run of two stages on one rank, and its log."""
    folder = tmp_path_factory.mktemp("adapters")
    file = make_run(folder, records=30)
    content = yaml.safe_load(file.read_text())
    plain: dict[str, Any] = content["stages"]["align"] | {"epochs": 4}
    lora = {"rank": 4, "alpha": 8, "dropout": 0.1}
    train = {"lora": 1e-2, "connector": 1e-2}
    content["model"]["language_model"]["new_tokens"] = ["<box>"]
    first = plain | {"lora": lora, "train": train | {"new_tokens": 1e-3}, "max_steps": 5, "save": {"every_steps": 2}}
    second = plain | {"lora": lora | {"quantize": "nf4"}, "train": train, "max_steps": 3, "init_from": "adapt"}
    content["stages"] = {"adapt": first, "further": second}
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    done = mmit("train", str(file), "--ranks", "1")
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stderr


def test_a_stage_goes_on_with_the_adapter_of_the_one_before(run: tuple[Path, str]) -> None:
    folder, log = run
    assert f"the adapter of {folder / 'adapt' / 'model'} goes on" in log
    first, second = metrics(folder / "adapt"), metrics(folder / "further")
    assert second[-1]["loss"] < 0.9 * first[0]["loss"]
    # the same first step with an adapter that learned for five steps, four bits notwithstanding
    assert second[0]["loss"] < first[0]["loss"]


def test_checkpoints_share_the_frozen_weights_with_the_model_at_the_end(run: tuple[Path, str]) -> None:
    folder = run[0] / "adapt"
    places = [folder / "checkpoints" / "step-000002" / "model", folder / "checkpoints" / "step-000004" / "model"]
    frozen = [place / "base" / "frozen.safetensors" for place in (*places, folder / "model")]
    assert all(file.samefile(frozen[0]) for file in frozen)
    assert frozen[0].stat().st_nlink == 3
    names = load_file(folder / "model" / "base" / "trained.safetensors").keys()
    tables = {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"}
    assert names == tables | {f"multi_modal_projector.linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")}


def test_the_merged_model_is_plain(run: tuple[Path, str], tmp_path: Path) -> None:
    merged = merge_directory(run[0] / "further", tmp_path / "merged")
    assert {"config.json", "model.safetensors"} <= {file.name for file in merged.iterdir()}
    assert not (merged / "adapter_config.json").exists()
