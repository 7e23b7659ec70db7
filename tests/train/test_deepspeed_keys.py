"""What zero.extra may say: keys that DeepSpeed knows and mmit does not own; nothing is passed over in silence."""

from typing import Any

import pytest
import torch

from mmit.config import Zero
from mmit.errors import ConfigError
from mmit.train.deepspeed_settings import deepspeed_config


def dictionary(extra: dict[str, Any]) -> dict[str, Any]:
    zero = Zero(stage=2, extra=extra)
    return deepspeed_config(zero, dtype=torch.float32, rows_per_micro_batch=1, micro_batches=2, clip_norm=1.0)


def test_known_keys_are_merged_last() -> None:
    made = dictionary({"wall_clock_breakdown": True, "zero_optimization": {"reduce_bucket_size": 500}})
    assert made["wall_clock_breakdown"] is True
    assert made["zero_optimization"]["reduce_bucket_size"] == 500
    assert made["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"wall_clock_breakdwn": True}, "no key 'wall_clock_breakdwn'; did you mean 'wall_clock_breakdown'"),
        ({"zero_optimisation": {}}, "no key 'zero_optimisation'; did you mean 'zero_optimization'"),
        (
            {"zero_optimization": {"reduce_bucket_sizes": 5}},
            "no key 'zero_optimization.reduce_bucket_sizes'; did you mean 'zero_optimization.reduce_bucket_size'",
        ),
        ({"flops_profiler": {"detaled": True}}, "no key 'flops_profiler.detaled'; did you mean .*detailed"),
        ({"data_types": {"colour": 1}}, "no key 'data_types.colour'"),
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, "refuses 'zero_optimization.reduce_bucket_size'"),
        ({"zero_optimization": {"stage": 1}}, "'zero_optimization.stage' is set by mmit"),
        ({"zero_optimization": 3}, "'zero_optimization' is a section"),
    ],
)
def test_what_deepspeed_would_ignore_is_refused_with_the_nearest_known_key(extra: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        dictionary(extra)
