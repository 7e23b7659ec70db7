"""Held-out samples in a stage: their loss, what pictures are worth in it, and that none of them is trained on."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from msgspec import structs
from PIL import Image
from runs import make_run
from test_metrics import record as step_record

from mmit.config import RunConfig, load_config
from mmit.conversation import Conversation
from mmit.data import open_source
from mmit.data.held_out import HeldOutSet, lenders
from mmit.data.shard_set import CACHE
from mmit.errors import ConfigError
from mmit.evaluate.losses import answer_loss
from mmit.models import build_model
from mmit.train.engine import Engine
from mmit.train.evaluation import plan_evaluation
from mmit.train.feed import make_feed
from mmit.train.metrics import Recorder
from mmit.train.sinks import Sinks
from mmit.train.text_watch import text_feed
from mmit.train.verdicts import best_so_far

ALIGN = "stages.align"


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("evaluation"), records=30)


def config_of(run_file: Path, *, trained: str, held_out: str, text: str = "none", cache: Path = CACHE) -> RunConfig:
    shards = run_file.parent / "shards"
    data = f"{ALIGN}.data={{workers: 0, cache: {cache}, mix: [{{shards: {shards}, subset: {trained}}}]}}"
    mix = f"[{{shards: {shards}, subset: {held_out}}}]"
    return load_config(run_file, [data, f"{ALIGN}.evaluate={{mix: {mix}, visual_gain: true, text: {text}}}"])


def grey(conversation: Conversation) -> Conversation:
    made = []
    for size in conversation.sizes:
        file = io.BytesIO()
        Image.new("RGB", size, (128, 128, 128)).save(file, "PNG")
        made.append(file.getvalue())
    return structs.replace(conversation, images=tuple(made))


def test_the_loss_and_the_gain_are_those_of_the_samples_one_by_one(run_file: Path) -> None:
    """Against rows that are not packed; fp32, another order of sums."""
    config = config_of(run_file, trained="first 60%", held_out="last 40%")
    loaded = build_model(config.model, dtype=torch.float32, seed=0)
    loaded.model.train()
    evaluation = plan_evaluation(config, "align", make_feed(config, config.stages["align"], loaded))
    assert evaluation is not None
    engine = cast("Engine", SimpleNamespace(module=loaded.model, forward=loaded.model))
    seen: list[str] = []
    record = evaluation.measure(engine, 7, seen.extend)

    source = open_source(run_file.parent / "shards")
    samples = [source.read(number) for number in range(18, 30)]
    pictured = [sample for sample in samples if sample.images]
    loaded.model.eval()
    assert record.loss == pytest.approx(answer_loss(loaded, samples, "true"), rel=1e-5)
    blank = answer_loss(loaded, [grey(sample) for sample in pictured], "true")
    gain = blank - answer_loss(loaded, pictured, "true")
    assert record.visual_gain["blank"] == pytest.approx(gain, abs=1e-5)
    assert record.visual_gain_by_source == {"tiny": record.visual_gain}
    assert (record.step, record.samples) == (7, 12)
    assert sorted(seen) == sorted([sample.id for sample in samples] + 2 * [sample.id for sample in pictured])


def test_a_model_that_learns_three_samples_by_heart_is_told_to_overfit_and_to_forget(
    run_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All weights of the tiny model, trained far too long on three samples."""
    config = config_of(run_file, trained="first 3", held_out="last 40%", text="probe", cache=tmp_path)
    loaded = build_model(config.model, dtype=torch.float32, seed=0)
    feed = make_feed(config, config.stages["align"], loaded)
    evaluation = plan_evaluation(config, "align", feed)
    assert evaluation is not None
    engine = cast("Engine", SimpleNamespace(module=loaded.model, forward=loaded.model))
    log = Recorder(tmp_path, steps=60, every_steps=100, resume_step=0, sinks=Sinks({}))
    optimizer = torch.optim.Adam(loaded.model.language_model.parameters(), lr=5e-3)
    batch = next(batch for step in feed.loader(start_step=0) for batch in step.batches)
    caplog.set_level("INFO", logger="mmit")
    for step in range(61):
        if step % 10 == 0:
            log.add_evaluation(evaluation.measure(engine, step, lambda _: None))
        loss = loaded.model(batch) / batch.trained_tokens
        log.add(step_record(step + 1, loss.item()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    log.close()
    said = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert any("the model overfits: the held-out loss was best at step" in line for line in said)
    assert any("the language model forgets: its loss on plain text went" in line for line in said)
    measured = [json.loads(line) for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    assert (measured[0]["step"], measured[0]["training_loss"]) == (0, None)
    assert best_so_far(tmp_path, step=60) == min((line["loss"], line["step"]) for line in measured)[::-1]


def test_measuring_leaves_every_module_in_its_mode_and_makes_no_gradient(run_file: Path) -> None:
    config = config_of(run_file, trained="first 60%", held_out="last 10%")
    loaded = build_model(config.model, dtype=torch.float32, seed=0)
    loaded.model.train()
    modes = [module.training for module in loaded.model.modules()]
    assert {True, False} == set(modes)  # the frozen tower is never in training mode
    evaluation = plan_evaluation(config, "align", make_feed(config, config.stages["align"], loaded))
    assert evaluation is not None
    during: list[bool] = []

    def forward(batch: object) -> torch.Tensor:
        during.append(loaded.model.training or torch.is_grad_enabled())
        return loaded.model(batch)

    evaluation.measure(cast("Engine", SimpleNamespace(module=loaded.model, forward=forward)), 1, lambda _: None)
    assert set(during) == {False}
    assert [module.training for module in loaded.model.modules()] == modes


def test_a_held_out_sample_that_is_trained_on_is_refused(run_file: Path) -> None:
    config = config_of(run_file, trained="first 70%", held_out="last 40%")
    loaded = build_model(config.model, dtype=torch.float32, seed=0)
    feed = make_feed(config, config.stages["align"], loaded)
    with pytest.raises(ConfigError, match=r"3 of the 12 held-out samples of tiny are trained on too; .*subset"):
        plan_evaluation(config, "align", feed)


def test_text_of_ones_own_is_what_has_no_pictures_and_is_not_trained_on(run_file: Path) -> None:
    shards = run_file.parent / "shards"
    config = config_of(run_file, trained="first 60%", held_out="last 10%", text=str(shards))
    loaded = build_model(config.model, dtype=torch.float32, seed=0)
    feed = make_feed(config, config.stages["align"], loaded)
    with pytest.raises(ConfigError, match=r"evaluate\.text: \d of the 6 held-out samples of tiny are trained on too"):
        plan_evaluation(config, "align", feed)  # every fifth of 30 samples has no picture
    held, apart = config.stages["align"], config_of(run_file, trained="last 1", held_out="first 1")
    other = make_feed(apart, apart.stages["align"], loaded)
    found = text_feed(str(shards), 4, held, other, seed=0, where="text")
    assert found is not None
    assert found.plan.samples == 4
    assert not any(found.plan.sources[0].read(number).images for number in range(4))


def test_held_out_samples_cannot_be_measured_several_times(run_file: Path) -> None:
    mix = f"[{{shards: {run_file.parent / 'shards'}, epochs: 2}}]"
    with pytest.raises(ConfigError, match="measured once each"):
        load_config(run_file, [f"{ALIGN}.evaluate={{mix: {mix}}}"])


def test_with_other_pictures_the_texts_stay_and_nobody_keeps_their_own(run_file: Path) -> None:
    shards = open_source(run_file.parent / "shards")
    numbers = np.arange(30, dtype=np.uint32)
    has_lender, partners = lenders(shards, numbers, seed=0)
    assert has_lender.tolist() == [bool(shards.read(number).images) for number in range(30)]
    own = HeldOutSet(shards, numbers[has_lender])
    other = HeldOutSet(shards, numbers[has_lender], pictures="other", partners=partners)
    blank = HeldOutSet(shards, numbers[has_lender], pictures="blank")
    assert sorted(partners.tolist()) == list(range(24))  # every fifth has no picture
    for number in range(24):
        sample, changed, empty = own.read(number), other.read(number), blank.read(number)
        assert sample.messages == changed.messages == empty.messages
        assert changed.images == own.read(int(partners[number])).images != sample.images
        assert changed.sizes == other.read_text(number).sizes
        assert [Image.open(io.BytesIO(image)).size for image in empty.images] == list(sample.sizes)
        assert other.place(number) == shards.place(int(numbers[has_lender][number]))
    assert len({own.fingerprint, other.fingerprint, blank.fingerprint}) == 3
