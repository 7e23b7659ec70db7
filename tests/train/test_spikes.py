"""A step whose loss is far above the median of those before it is seen before its update, also after a resumption."""

import json
from dataclasses import asdict

import pytest
import torch

from mmit.config import Spike
from mmit.errors import TrainingError
from mmit.train.spikes import Spikes, SpikeState

BATCHES = [(torch.tensor(30.0), 10, ("a",)), (torch.tensor(28.0), 2, ("b", "c")), (torch.tensor(0.0), 0, ())]
STEADY = (2.0, 1.9, 2.1)  # the median is 2


def spikes(state: SpikeState | None = None, **rules: object) -> Spikes:
    chosen = Spike.model_validate({"factor": 3.0, "window": 3, "limit": 2, **rules})
    return Spikes(chosen, state or SpikeState(recent=STEADY), stage="one")


def judge(one: Spikes, loss: float, step: int = 9) -> str:
    return one.judge(loss, step=step, batches=BATCHES)


def test_nothing_is_judged_before_the_window_is_full_and_without_rules() -> None:
    young = spikes(SpikeState(recent=(2.0, 2.0)), action="skip")
    assert judge(young, 100.0) == ""
    assert young.state.recent == (2.0, 2.0, 100.0)
    assert Spikes(None, SpikeState(), stage="one").judge(1e9, step=1, batches=[]) == ""


def test_the_bound_is_factor_times_the_median_and_a_skipped_loss_does_not_move_it() -> None:
    one = spikes(action="skip")
    assert judge(one, 6.01) == "skip"
    assert one.state == SpikeState(recent=STEADY, skipped=1)
    assert judge(one, 6.0) == ""
    assert one.state.recent == (1.9, 2.1, 6.0)
    assert judge(one, 6.31) == "skip"  # the median is 2.1 by now


def test_a_loss_that_was_only_told_was_trained_on_and_counts() -> None:
    one = spikes(action="warn")
    assert judge(one, 9.0) == "warn"
    assert one.state.recent == (1.9, 2.1, 9.0)


def test_a_spike_ends_the_run_with_its_numbers_and_samples() -> None:
    with pytest.raises(TrainingError, match=r"is 8, more than 3 times 2, .* rank 0 with 14: b, c\. Look"):
        judge(spikes(), 8.0)


def test_beyond_the_limit_skipping_ends_the_run() -> None:
    one = spikes(action="skip")
    assert [judge(one, 8.0), judge(one, 8.0)] == ["skip", "skip"]
    with pytest.raises(TrainingError, match=r"2 updates were left out already, as many as stages\.one\.spike\.limit"):
        judge(one, 8.0)


def test_a_run_that_was_resumed_judges_as_one_that_was_not() -> None:
    losses = [2.0, 1.7, 6.3, 0.1 + 0.2, 5.4, 1.9, 5.8, 2.0]
    whole = spikes(action="skip", limit=9)
    verdicts = [judge(whole, loss) for loss in losses]
    assert set(verdicts) == {"", "skip"}
    pieced, found = spikes(action="skip", limit=9), []
    for loss in losses:
        found.append(judge(pieced, loss))
        kept = json.loads(json.dumps(asdict(pieced.state)))
        state = SpikeState(recent=tuple(kept["recent"]), skipped=kept["skipped"])
        pieced = spikes(state, action="skip", limit=9)
    assert (found, pieced.state) == (verdicts, whole.state)
