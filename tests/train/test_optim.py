"""Schedule values by hand; the weight-decay split."""

import pytest
import torch
from torch import nn

from mmit.models import TrainGroup
from mmit.train.optim import LearningRate, Schedule, parameter_groups


def factors(schedule: Schedule, *, steps: int, warmup: float, low: float = 0.0) -> list[float]:
    rate = LearningRate(schedule=schedule, warmup_fraction=warmup, min_lr_fraction=low, steps=steps)
    return [round(rate.factor(step), 6) for step in range(steps)]


def test_warm_up_rises_linearly_and_does_not_start_at_zero() -> None:
    # 3 of 10 steps warm up: 1/4, 2/4, 3/4 of the peak, then the peak
    assert factors("constant", steps=10, warmup=0.3) == [0.25, 0.5, 0.75] + [1.0] * 7


def test_cosine_is_half_way_down_in_the_middle() -> None:
    # after 2 warm-up steps, 8 steps of cosine: (1 + cos(pi * k / 8)) / 2
    assert factors("cosine", steps=10, warmup=0.2)[2:] == [
        1.0,
        0.96194,
        0.853553,
        0.691342,
        0.5,
        0.308658,
        0.146447,
        0.03806,
    ]


def test_linear_ends_at_the_floor() -> None:
    assert factors("linear", steps=5, warmup=0.0, low=0.5) == [1.0, 0.9, 0.8, 0.7, 0.6]


def test_one_step_has_a_learning_rate() -> None:
    assert factors("cosine", steps=1, warmup=0.03) == [0.5]


def test_only_matrices_are_decayed() -> None:
    model = nn.ModuleDict(
        {"embedding": nn.Embedding(5, 4), "linear": nn.Linear(4, 3), "norm": nn.LayerNorm(3), "other": nn.Linear(3, 2)}
    )
    groups = [
        TrainGroup("connector", 1e-3, ("linear.weight", "linear.bias")),
        TrainGroup("language_model", 1e-5, ("embedding.weight", "norm.weight", "norm.bias")),
    ]
    result = parameter_groups(model, groups, weight_decay=0.1)
    assert [(g["name"], g["lr"], g["weight_decay"], [tuple(p.shape) for p in g["params"]]) for g in result] == [
        ("connector", 1e-3, 0.1, [(3, 4)]),
        ("connector", 1e-3, 0.0, [(3,)]),
        ("language_model", 1e-5, 0.0, [(5, 4), (3,), (3,)]),
    ]


def test_a_head_tied_to_the_embedding_is_not_decayed() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embedding"].weight
    groups = parameter_groups(model, [TrainGroup("all", 1.0, ("embedding.weight",))], weight_decay=0.1)
    assert [group["weight_decay"] for group in groups] == [0.0]


def test_no_decay_gives_one_group() -> None:
    model = nn.Linear(2, 2)
    assert len(parameter_groups(model, [TrainGroup("all", 1.0, ("weight", "bias"))], weight_decay=0.0)) == 1


@pytest.mark.parametrize("step", [0, 1, 2])
def test_adamw_moves_by_the_learning_rate_in_its_first_step(step: int) -> None:
    from mmit.train.optim import adamw

    # Adam's first update is lr * g / (|g| + eps): the sign of the gradient times lr
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = adamw([{"params": [weight], "lr": 0.1, "weight_decay": 0.0}], betas=(0.9, 0.999), eps=1e-12)
    weight.grad = torch.tensor([5.0, -1.0, 0.5])
    optimizer.step()
    expected = torch.tensor([0.9, -1.9, 2.9])
    torch.testing.assert_close(weight.data[step], expected[step], rtol=0, atol=1e-6)  # eps and fp32 rounding
