"""Checkpoints that are written while training goes on: what they hold, and what fails there."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_factories import tiny_model_section
from safetensors.torch import load_file

from mmit.config import ComposedModel, Zero
from mmit.errors import CheckpointError
from mmit.models import LoadedModel, build_model, tensor_file
from mmit.train import checkpoint, engine_state
from mmit.train.copies import Copies
from mmit.train.deepspeed_settings import deepspeed_config
from mmit.train.engine import Engine
from mmit.train.model_writer import ModelWriter
from mmit.train.optim import adamw, parameter_groups
from mmit.train.saving import Saver
from mmit.train.stage_folder import complete

STATE = checkpoint.RunState(
    step=1, stage="align", plan="p", world=1, zero_stage=0, precision="float32", settings={}, skipped={}
)


@pytest.fixture(scope="module")
def started(one_rank: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Engine]:
    """A tiny model of which the connector trains, on one rank under ZeRO-2, after one step."""
    section = ComposedModel.model_validate(tiny_model_section(tmp_path_factory.mktemp("parts")))
    loaded = build_model(section, dtype=torch.float32, seed=0)
    groups = parameter_groups(loaded.model, loaded.model.train_only({"connector": 1e-2}), weight_decay=0.0)
    settings = deepspeed_config(
        Zero(stage=2), dtype=torch.float32, rows_per_micro_batch=1, micro_batches=1, clip_norm=0.0
    )
    return loaded, Engine(loaded.model, adamw(groups, betas=(0.9, 0.999), eps=1e-8), settings, dtype=torch.float32)


@pytest.fixture
def saver(started: tuple[LoadedModel, Engine], tmp_path: Path) -> Iterator[Callable[..., Saver]]:
    made: list[Saver] = []

    def make(on_failure: Callable[[], None] = lambda: None) -> Saver:
        loaded, engine = started
        model = ModelWriter(engine, loaded, dict, None, tmp_path)
        made.append(Saver(tmp_path, engine, model, keep_last=2, background=True, on_failure=on_failure))
        return made[-1]

    yield make
    for one in made:
        one.close()


def change_weights(engine: Engine) -> None:
    with torch.no_grad():
        for parameter in engine.module.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
        for group in engine.optimizer.param_groups:
            for flat in group["params"]:
                flat.add_(1)


def test_what_is_written_is_the_state_of_the_step_however_the_weights_change_meanwhile(
    started: tuple[LoadedModel, Engine], saver: Callable[..., Saver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk does not answer until the weights have changed; the steps go on meanwhile."""
    loaded, engine = started
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    changed = threading.Event()
    sync = os.fsync
    monkeypatch.setattr(tensor_file.os, "fsync", lambda number: (changed.wait(30), sync(number)))
    one = saver()
    one.save(STATE)
    assert complete(tmp_path) == []
    change_weights(engine)
    changed.set()
    one.finish()
    assert [path.name for path in complete(tmp_path)] == ["step-000001"]
    found = checkpoint.read_state(tmp_path / "step-000001", steps=1)  # every file as its CRC says
    assert found == STATE
    written = load_file(tmp_path / "step-000001" / "model" / "model.safetensors")
    name = "multi_modal_projector.linear_1.weight"
    assert torch.equal(written[name], before[name])
    assert not torch.equal(written[name], loaded.model.get_parameter(name))
    engine_state.load(engine, tmp_path / "step-000001" / "engine")
    after = loaded.model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not list(tmp_path.glob(".*"))


def test_a_disk_that_fills_up_stops_the_run_and_is_told_at_the_next_save_or_at_the_end(
    saver: Callable[..., Saver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = threading.Event()
    one = saver(asked.set)
    one.save(STATE, in_step=True)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tensor_file.os, "fsync", full)
        one.save(replace(STATE, step=2))
        assert asked.wait(30)
    with pytest.raises(CheckpointError) as told:
        one.save(replace(STATE, step=3))
    sentence = str(told.value)
    assert sentence.startswith("the checkpoint was not written: cannot write the model to ")
    assert "No space left on device; " in sentence
    assert sentence.endswith("step-000001 is still complete; mend this and run the same command")
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_one_is_on_its_way_at_a_time_and_the_oldest_are_removed(saver: Callable[..., Saver], tmp_path: Path) -> None:
    one = saver()
    for step in (1, 2, 3, 3):
        one.save(replace(STATE, step=step))
    one.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]


def test_a_second_copy_lies_where_the_first_did_and_shares_nothing_with_what_is_copied() -> None:
    copies, weight = Copies(), torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    first = copies.of("weight 0", weight)
    assert (first.tolist(), first.requires_grad) == ([1.0, 2.0], False)
    with torch.no_grad():
        weight += 1
    assert first.tolist() == [1.0, 2.0]
    assert copies.of("weight 0", weight) is first
    assert first.tolist() == [2.0, 3.0]
    assert copies.of("weight 0", weight[:1]).tolist() == [2.0]
