"""Run on two ranks: every way of DeepSpeed that mmit offers, three steps each, against the same steps in plain torch.

A way makes two steps from the start and saves; the next way of the same precision is then loaded with what the one
before it saved, and makes the third step. So each way is held to plain torch from a fresh start and as one that
continues another way's checkpoint. Prints one JSON object: by way, the largest
difference of any loss, of the norms, and of the weights after the third step.

    python tests/distributed/test_deepspeed_ways.py     prints the table of docs/deepspeed.md
"""

import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import torch  # noqa: E402
from exact_step import EPS, RULES, micro_batches, sample  # noqa: E402

from mmit.batch import Batch, collate  # noqa: E402
from mmit.config import Zero, load_config  # noqa: E402
from mmit.distributed import all_reduce_sum, rank  # noqa: E402
from mmit.models import build_model  # noqa: E402
from mmit.models.placement import WHOLE, placed  # noqa: E402
from mmit.models.shared_rows import RowGroup, share_rows  # noqa: E402
from mmit.train import engine_state  # noqa: E402
from mmit.train.copies import Copies  # noqa: E402
from mmit.train.deepspeed_settings import deepspeed_config  # noqa: E402
from mmit.train.engine import Engine, init_process_group  # noqa: E402
from mmit.train.optim import adamw, parameter_groups  # noqa: E402
from mmit.train.partition import Partitioned  # noqa: E402
from mmit.train.pieces import optimizer_steps  # noqa: E402

STEPS = 3
SCALE_POWER = 8  # of fp16: no gradient of these steps overflows


@dataclass(frozen=True)
class Way:
    """What the run file says, and how many micro-batches the rows of a rank are cut into."""

    zero: Zero
    precision: str = "fp32"
    micro_batches: int = 2
    sequence: int = 1


def ways(nvme: Path | None) -> dict[str, Way]:
    """All that is tried, in the order in which states are handed on; ``nvme``: only what goes to that folder."""
    if nvme is not None:
        disk: dict[str, Any] = {"stage": 3, "nvme_path": str(nvme)}
        cut = {"zero_optimization": {"sub_group_size": 600_000}}
        return {
            "ZeRO-3, optimizer on disk": Way(Zero(**disk, offload_optimizer="nvme")),
            "ZeRO-3, in memory": Way(Zero(stage=3)),
            "ZeRO-3, optimizer on disk in sub-groups, parameters on CPU": Way(
                Zero(**disk, offload_optimizer="nvme", offload_parameters="cpu", extra=cut)
            ),
        }
    pieces = {"sub_group_size": 4000, "stage3_param_persistence_threshold": 200, "stage3_prefetch_bucket_size": 1000}
    both: dict[str, Any] = {"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}
    scaled = {"fp16": {"initial_scale_power": SCALE_POWER}}
    return {
        "ZeRO-0": Way(Zero(stage=0)),
        "ZeRO-1": Way(Zero(stage=1)),
        "ZeRO-2": Way(Zero(stage=2)),
        "ZeRO-3": Way(Zero(stage=3)),
        "ZeRO-2, optimizer on CPU": Way(Zero(stage=2, offload_optimizer="cpu")),
        "ZeRO-3, optimizer on CPU": Way(Zero(stage=3, offload_optimizer="cpu")),
        "ZeRO-3, parameters on CPU": Way(Zero(stage=3, offload_parameters="cpu")),
        "ZeRO-3, both on CPU": Way(Zero(**both)),
        "ZeRO-2, one micro-batch, small buckets": Way(
            Zero(stage=2, extra={"zero_optimization": {"reduce_bucket_size": 1000, "overlap_comm": True}}),
            micro_batches=1,
        ),
        "ZeRO-3, sub-groups and thresholds": Way(Zero(stage=3, extra={"zero_optimization": pieces})),
        "ZeRO-2, rows shared by two ranks": Way(Zero(stage=2), micro_batches=4, sequence=2),
        "ZeRO-3, rows shared by two ranks": Way(Zero(stage=3), micro_batches=4, sequence=2),
        "bf16, ZeRO-0": Way(Zero(stage=0), "bf16"),
        "bf16, ZeRO-2": Way(Zero(stage=2), "bf16"),
        "bf16, ZeRO-3, both on CPU": Way(Zero(**both), "bf16"),
        "fp16, ZeRO-0": Way(Zero(stage=0, extra=scaled), "fp16"),
        "fp16, ZeRO-2, optimizer on CPU": Way(Zero(stage=2, offload_optimizer="cpu", extra=scaled), "fp16"),
        "fp16, ZeRO-3": Way(Zero(stage=3, extra=scaled), "fp16"),
    }


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def batches_of(loaded: Any, count: int) -> list[list[Batch]]:
    """By rank: rows with 5/1 and 2/7 trained tokens in 1 or 2 micro-batches (see ``exact_step``); 4: all of them."""
    if count > 1:
        made = micro_batches(loaded)
        return made if count == 2 else [[*made[0], *made[1]]] * 2
    rows = [
        [
            [sample(1, text=9, images=1, trained=5, loaded=loaded)],
            [sample(2, text=4, images=2, trained=1, loaded=loaded, width=56)],
        ],
        [
            [
                sample(3, text=6, images=0, trained=1, loaded=loaded),
                sample(4, text=5, images=0, trained=1, loaded=loaded),
            ],
            [sample(5, text=12, images=0, trained=7, loaded=loaded)],
        ],
    ]
    return [[collate(of_rank, pad_id=loaded.pad_id, image_size=loaded.model.spec.canvas)] for of_rank in rows]


@dataclass
class Course:
    """What three steps gave."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]


def plain_course(config: Any, precision: str) -> Course:
    """The steps in one process without DeepSpeed: gradients in the precision, master weights and Adam in fp32."""
    dtype = DTYPES[precision]
    loaded = build_model(config.model, dtype=dtype, seed=0)
    groups = parameter_groups(loaded.model, loaded.model.train_only(RULES), weight_decay=0.1)
    masters = {parameter: parameter.detach().float().clone() for group in groups for parameter in group["params"]}
    optimizer = adamw(
        [{**group, "params": [masters[parameter] for parameter in group["params"]]} for group in groups],
        betas=(0.9, 0.999),
        eps=EPS,
    )
    batches = [batch for of_rank in micro_batches(loaded) for batch in of_rank]
    total = sum(batch.trained_tokens for batch in batches)
    scale = 2.0**SCALE_POWER if precision == "fp16" else 1.0
    course = Course([], [], {})
    for _ in range(STEPS):
        sums = [loaded.model(batch) for batch in batches]
        course.losses.append(float(sum(float(each.detach()) for each in sums)) / total)
        for each in sums:
            (each * (scale / total)).backward()
        for parameter, master in masters.items():
            assert parameter.grad is not None
            master.grad = parameter.grad.float() / scale
            parameter.grad = None
        course.norms.append(float(torch.nn.utils.clip_grad_norm_(list(masters.values()), 0.5)))
        optimizer.step()
        with torch.no_grad():
            for parameter, master in masters.items():
                parameter.copy_(master)
    course.weights = {name: value.float() for name, value in loaded.model.state_dict().items()}
    return course


class Run:
    """A model under an engine, made one way."""

    def __init__(self, config: Any, way: Way) -> None:
        dtype = DTYPES[way.precision]
        settings = deepspeed_config(
            way.zero, dtype=dtype, rows_per_micro_batch=1, micro_batches=way.micro_batches, clip_norm=0.5
        )
        with placed(Partitioned(settings) if way.zero.stage == 3 else WHOLE):
            self.loaded = build_model(config.model, dtype=dtype, seed=0)
        if way.sequence > 1:
            ranks, _ = torch.distributed.new_subgroups(group_size=way.sequence)
            share_rows(self.loaded.model, RowGroup(ranks, rank() % way.sequence, way.sequence))
        groups = self.loaded.model.train_only(RULES)
        optimizer = adamw(parameter_groups(self.loaded.model, groups, weight_decay=0.1), betas=(0.9, 0.999), eps=EPS)
        self.engine = Engine(self.loaded.model, optimizer, settings, dtype=dtype)
        self.sequence = way.sequence
        self.batches = batches_of(self.loaded, way.micro_batches)[rank()]

    def step(self) -> tuple[float, float]:
        """Loss and norm of one step."""
        trained = int(all_reduce_sum(torch.tensor([sum(batch.trained_tokens for batch in self.batches)])))
        trained //= self.sequence
        loss = torch.zeros((), dtype=torch.float64)
        norm = None
        for batch in self.batches:
            loss += self.engine.micro_step(batch, trained_tokens=trained).double()
            norm = self.engine.close_micro_step(factor=1.0)
        assert norm is not None
        return float(all_reduce_sum(loss)) / trained, norm


State = tuple[Path, dict[str, torch.Tensor]]
"""A saved state, and the weights that it is of."""


def try_way(
    config: Any, way: Way, expected: Course, before: State | None, after: Path
) -> tuple[dict[str, float], State]:
    """Two steps from the start, saved to ``after``; a third on the state of ``before``, or on its own.

    Gives what was found, and the state that was saved.
    """
    started = Run(config, way)
    made = [started.step() for _ in range(STEPS - 1)]
    taken = engine_state.take(started.engine, copies=Copies())
    saved = (after, copy_of(started.engine))
    started.step()  # a copy stays what it was
    taken.write(after)
    torch.distributed.barrier()
    del started
    going_on = Run(config, way)
    source, wanted_bits = before or saved
    engine_state.load(going_on.engine, source)
    loaded = copy_of(going_on.engine)
    steps = optimizer_steps(going_on.engine)
    made.append(going_on.step())
    weights = copy_of(going_on.engine)
    off = [float((weights[name].float() - value).abs().max()) for name, value in expected.weights.items() if weights]
    found = {
        "loss": max(abs(loss - wanted) for (loss, _), wanted in zip(made, expected.losses, strict=True)),
        "norm": max(abs(norm - wanted) / wanted for (_, norm), wanted in zip(made, expected.norms, strict=True)),
        "weights": max(off, default=0.0),
        "steps": steps,
        "same bits": loaded.keys() == wanted_bits.keys()
        and all(torch.equal(loaded[name], value) for name, value in wanted_bits.items()),
    }
    return found, saved


def copy_of(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in engine.weights()}


def overflowing(config: Any, folder: Path) -> dict[str, Any]:
    """fp16 from a loss scale that is too large, interrupted after two steps, against the same without."""
    way = Way(Zero(stage=2, extra={"fp16": {"initial_scale_power": 15, "hysteresis": 1}}), "fp16")
    whole, first = Run(config, way), Run(config, way)
    lines: dict[str, list[Any]] = {"whole": [], "in two": []}

    def make(run: Run, count: int, where: str) -> None:
        for _ in range(count):
            loss, norm = run.step()
            scale = run.engine.loss_scale
            assert scale is not None
            lines[where].append([loss, str(norm), scale.scale, scale.left_out, optimizer_steps(run.engine)])

    make(whole, 5, "whole")
    make(first, 2, "in two")
    engine_state.take(first.engine, copies=None).write(folder)
    torch.distributed.barrier()
    second = Run(config, way)
    engine_state.load(second.engine, folder)
    make(second, 3, "in two")
    return lines


def main(run_file: str, nvme: str = "") -> None:
    torch.set_num_threads(1)
    init_process_group()
    torch.set_num_threads(1)
    from deepspeed.accelerator import get_accelerator

    # torch computes fp16 on every CPU, slowly; DeepSpeed asks for fast kernels
    get_accelerator().is_fp16_supported = lambda: True
    config = load_config(Path(run_file), ['model.tiling={"type": "anyres"}'])
    folder = Path(run_file).parent / "ways"
    chosen = ways(Path(nvme) if nvme else None)
    result: dict[str, Any] = {}
    courses: dict[str, Course] = {}
    before: State | None = None
    for number, (name, way) in enumerate(chosen.items()):
        if way.precision not in courses:
            courses[way.precision] = plain_course(config, way.precision)
            before = None
        result[name], before = try_way(config, way, courses[way.precision], before, folder / str(number))
    start = build_model(config.model, dtype=torch.float32, seed=0).model.state_dict()
    ended = courses["fp32"].weights
    result["moved"] = max(float((start[name] - ended[name]).abs().max()) for name in ended)
    result["losses"] = {precision: course.losses for precision, course in courses.items()}
    if not nvme:
        result["overflowing"] = overflowing(config, folder / "overflowing")
    if rank() == 0:
        print(json.dumps(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
