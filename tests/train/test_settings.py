"""An edited run file is not silently taken for the one before."""

from pathlib import Path

import pytest

from mmit.config import RunConfig
from mmit.config_file import parse
from mmit.errors import ConfigError
from mmit.train.settings import check_unchanged, deciding_settings

RUN = """
name: tiny
model: {path: some/model}
stages:
  one:
    train: {connector: 1e-3}
    data: {mix: [{shards: a}]}
    batch: {length: 8, tokens_per_step: 16}
  two:
    init_from: one
    train: {connector: 1e-3}
    data: {mix: [{shards: a}]}
    batch: {length: 8, tokens_per_step: 16}
"""


def config(*overrides: str) -> RunConfig:
    return parse(RUN, source="run.yaml", overrides=list(overrides))


def settings(*overrides: str) -> dict:
    return deciding_settings(config(*overrides), "one")


@pytest.mark.parametrize("override", ["stages.two.train.connector=1", "stages.one.save.every_steps=7", "output=x"])
def test_what_does_not_decide_the_weights_of_a_stage_may_change(override: str) -> None:
    check_unchanged(settings(), config(override), "one", what=Path("run/one"))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("stages.one.train.connector=2e-3", "stages.one.train.connector was 0.001 and is 0.002"),
        ("seed=1", "seed was 0 and is 1"),
        ("model.path=other", "model.path was 'some/model' and is 'other'"),
        ("stages.one.train.language_model=1", "stages.one.train.language_model was 'not set' and is 1.0"),
    ],
)
def test_what_decides_them_is_named_with_both_values(override: str, told: str) -> None:
    with pytest.raises(ConfigError, match="--fresh") as caught:
        check_unchanged(settings(), config(override), "one", what=Path("run/one"))
    assert told in str(caught.value)


def test_a_setting_that_is_newer_than_the_run_may_have_its_default_only() -> None:
    before = settings()
    del before["stages.one.data.control"]
    before["stages.one.zero.stage"] = 3  # once counted as deciding
    check_unchanged(before, config(), "one", what=Path("run/one"))
    with pytest.raises(ConfigError, match=r"data\.control was 'not set' and is 'blank_image'"):
        check_unchanged(before, config("stages.one.data.control=blank_image"), "one", what=Path("run/one"))
