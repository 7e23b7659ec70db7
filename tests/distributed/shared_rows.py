"""Run on two ranks: rows that both share, in attention alone and in whole stages; and a stage short of memory.

Prints the largest differences of attention and its gradients for several numbers of key heads; and the lines of
metrics and of held-out losses of a stage on rows of one rank, on shared rows, and of its continuation; and what a stage
with ``activation_checkpointing: auto`` does and says where no way fits into the memory of a rank.
"""

import json
import logging
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

warnings.filterwarnings("ignore")

import torch  # noqa: E402
from torch import nn  # noqa: E402

from mmit.config import load_config  # noqa: E402
from mmit.distributed import rank  # noqa: E402
from mmit.errors import MmitError  # noqa: E402
from mmit.models.attention import boundaries, packed_attention  # noqa: E402
from mmit.models.shared_rows import RowGroup, shared_attention  # noqa: E402
from mmit.models.vlm import VisionLanguageModel  # noqa: E402
from mmit.train import zero_choice  # noqa: E402
from mmit.train.engine import init_process_group  # noqa: E402
from mmit.train.stage import train_stage  # noqa: E402

TOLD = ("loss", "grad_norm", "tokens", "trained_tokens", "images", "samples", "samples_digest", "loss_by_source")


def attention_difference(key_heads: int) -> float:
    """Of the output and the gradients of a row of 12 tokens in three samples, 4 heads of 8."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn((1, heads, 12, 8), generator=generator) for heads in (4, key_heads, key_heads)]
    asked = torch.randn((1, 12, 4, 8), generator=generator)
    mask = boundaries(torch.tensor([[0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5]]))
    whole = [one.clone().requires_grad_() for one in states]
    query, key, value = whole
    expected, _ = packed_attention(nn.Module(), query, key, value, mask)
    wanted = torch.autograd.grad((expected * asked).sum(), whole)
    own = slice(6 * rank(), 6 * rank() + 6)
    parts = [one[:, :, own].clone().requires_grad_() for one in states]
    ranks = torch.distributed.group.WORLD
    assert ranks is not None
    query, key, value = parts
    got, _ = shared_attention(RowGroup(ranks, rank(), 2), nn.Module(), query, key, value, mask)
    gradients = torch.autograd.grad((got * asked[:, own]).sum(), parts)
    pairs = [(got, expected[:, own]), *((one, all_[:, :, own]) for one, all_ in zip(gradients, wanted, strict=True))]
    return max(float((one - other).detach().abs().max()) for one, other in pairs)


def stage(run_file: Path, output: str, sequence: int, **more: Any) -> dict[str, Any]:
    """The lines of four steps in the stage ``instruct``, trained from the parts; more: keys of the stage."""
    mix = [{"shards": str(run_file.parent / "shards"), "subset": "first 80%"}]
    held = [{"shards": str(run_file.parent / "shards"), "subset": "last 20%"}]
    changes = {
        "data": {"mix": mix, "workers": 0},
        "init_from": "parts",
        "max_steps": 4,
        "save": {"every_steps": 2},
        "log": {"by_source": True},
        "evaluate": {"mix": held, "every_steps": 4},
        "parallel": {"sequence": sequence},
        "zero": {"stage": 2},
        **more,
    }
    words = [f"stages.instruct.{key}={json.dumps(value)}" for key, value in changes.items()]
    config = load_config(run_file, [f"output={run_file.parent / output}", *words])
    folder = train_stage(config, "instruct").parent
    read = {name: [json.loads(line) for line in (folder / name).read_text().splitlines()] for name in FILES}
    steps = [{key: line[key] for key in TOLD} for line in read["metrics.jsonl"]]
    return {"steps": steps, "held_out": [[line["loss"], line["trained_tokens"]] for line in read["evaluation.jsonl"]]}


FILES = ("metrics.jsonl", "evaluation.jsonl")


def short_of_memory(run_file: Path) -> dict[str, Any]:
    """A stage on ranks with a byte of memory each: its lines, what it said, and which layers it recomputes."""
    said, told = list[str](), list[int]()

    def note(model: VisionLanguageModel, every: int) -> None:
        if not next(model.parameters()).is_meta:  # a plan tries all ways, on shapes
            told.append(every)
        recompute(model, every)

    logging.getLogger("mmit").addFilter(lambda record: said.append(record.getMessage()) is None)
    recompute = VisionLanguageModel.enable_activation_checkpointing
    with (
        patch.object(zero_choice, "_memory", lambda: 1),
        patch.object(VisionLanguageModel, "enable_activation_checkpointing", note),
    ):
        lines = stage(run_file, "short", 1, activation_checkpointing="auto")
    return lines | {"said": said, "every": told}


def main(run_file: str) -> None:
    torch.set_num_threads(1)
    path = Path(run_file)
    with patch.object(torch.distributed, "destroy_process_group"):  # DeepSpeed does not make a second one
        result: dict[str, Any] = {"alone": stage(path, "alone", 1), "shared": stage(path, "shared", 2)}
        if rank() == 0:
            shutil.rmtree(path.parent / "shared" / "instruct" / "model")
        torch.distributed.barrier()  # else the other rank may still find a finished stage
        result["continued"] = stage(path, "shared", 2)
        result["short"] = short_of_memory(path)
        try:
            stage(path, "three", 3)
        except MmitError as error:
            result["refused"] = str(error)
    init_process_group()
    result["attention"] = {heads: attention_difference(heads) for heads in (4, 2, 1)}
    if rank() == 0:
        print(json.dumps(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
