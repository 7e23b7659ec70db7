"""How `mmit data show` sees samples: with the tiles and the template of the model that is named."""

from pathlib import Path

import pytest
import yaml
from model_factories import tiny_model_section

from mmit.errors import ConfigError
from mmit.train.views import view_of


def test_the_model_of_a_run_file_shows_its_own_tiles_and_template(tmp_path: Path) -> None:
    model = tiny_model_section(tmp_path / "parts")
    stage = {"train": {"connector": 1.0}, "data": {"mix": [{"shards": "x"}]}}
    stages = {"a": {**stage, "batch": {"length": 8, "tokens_per_step": 8}}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"name": "r", "model": model, "stages": stages}))
    view = view_of(str(tmp_path / "run.yaml"), template="own", style=None, image_tokens=None)
    assert (view.spec.size, view.spec.tokens_per_tile) == ((28, 28), 4)  # tiles of 28 pixels in patches of 14
    with pytest.raises(ConfigError, match=r"--style: .*run.yaml has a model that knows this"):
        view_of(str(tmp_path / "run.yaml"), template="own", style="llava", image_tokens=None)
