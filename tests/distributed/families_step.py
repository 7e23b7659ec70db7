"""Run on every rank: one ZeRO-3 step of each family of language models, born partitioned, against one in plain torch.

Prints, for each family, the largest difference of any parameter after the step and that of the loss.
"""

import gc
import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

warnings.filterwarnings("ignore")

import torch  # noqa: E402
from exact_step import engine_step, full_batch_step  # noqa: E402
from family_factories import FAMILIES, family_section  # noqa: E402

from mmit.config import ComposedModel, Zero  # noqa: E402
from mmit.distributed import rank  # noqa: E402
from mmit.train.engine import init_process_group  # noqa: E402


@dataclass(frozen=True)
class Run:
    """What the steps ask of a run file."""

    model: ComposedModel


def facts(run: Run) -> dict[str, float]:
    got, got_loss, norm = engine_step(run, Zero(stage=3), checkpointing=False)
    if rank() != 0:
        return {}
    expected, loss, _ = full_batch_step(run)
    assert got.keys() == expected.keys(), set(got) ^ set(expected)
    differences = (float((got[name] - expected[name]).abs().max()) for name in expected)
    return {"parameters": max(differences), "loss": abs(got_loss - loss), "norm": norm}


def main(folder: str) -> None:
    torch.set_num_threads(1)
    init_process_group()
    torch.set_num_threads(1)
    gc.freeze()  # DeepSpeed collects garbage for each engine; what was imported is none
    found = {name: facts(Run(family_section(name, Path(folder)))) for name in FAMILIES}
    if rank() == 0:
        print(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
