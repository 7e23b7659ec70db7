"""Memory that a rank takes until its model is ready: ``python benchmarks/startup_memory.py``.

Two ranks make a model of 0.5 GB (fp32, random weights) from parts and from a directory, whole (as under ZeRO-0 to 2)
and partitioned from birth (ZeRO-3). Counted is the peak of anonymous memory (RssAnon) above what a rank holds before;
pages of memory-mapped weight files are the file cache's, which gives them up.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from pathlib import Path

RANKS = 2
WAYS = ("parts, whole", "parts, partitioned", "directory, whole", "directory, partitioned")
SAMPLE_SECONDS = 0.002
MEGABYTE = 1e6


def main() -> None:
    """Make the parts, measure each way in fresh processes, print a line for each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_model(folder)
        print(f"model of {size / MEGABYTE:.0f} MB; peak above the start, by rank")
        for way in WAYS:
            peaks = [int(line) for line in run_ranks(__file__, str(folder), way)]
            shares = ", ".join(f"{peak / MEGABYTE:.0f} MB ({peak / size:.2f} of the model)" for peak in peaks)
            print(f"{way:<24}{shares}", flush=True)


def write_model(folder: Path, *, width: int = 1024, layers: int = 8) -> int:
    """Write parts and a model directory; gives the bytes of the model's weights."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        CLIPVisionModel,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    from mmit.config import ComposedModel
    from mmit.models import build_model, save_model

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder / "llm")
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8192,
            hidden_size=width,
            intermediate_size=width * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=16,
        )
    ).save_pretrained(folder / "llm")
    CLIPVisionModel(
        CLIPVisionConfig(hidden_size=96, num_hidden_layers=2, image_size=28, patch_size=14)
    ).save_pretrained(folder / "clip")
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(
        folder / "clip"
    )
    section = {
        "encoder": {"type": "transformers", "path": str(folder / "clip")},
        "language_model": {"path": str(folder / "llm"), "template": "vicuna"},
    }
    (folder / "section.json").write_text(json.dumps(section), encoding="utf-8")
    loaded = build_model(ComposedModel.model_validate(section), dtype=torch.float32, seed=0)
    save_model(loaded, None, folder / "saved", made_from={})
    return sum(parameter.numel() * parameter.element_size() for parameter in loaded.model.parameters())


def run_ranks(script: str, *arguments: str) -> list[str]:
    """Run a script as ``RANKS`` ranks; the last word that each prints."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", script, *arguments],
            env=common | {"RANK": str(number), "LOCAL_RANK": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for number in range(RANKS)
    ]
    return [rank.communicate()[0].split()[-1] for rank in ranks]


def _rank(folder: Path, way: str) -> None:
    import torch

    from mmit.config import ComposedModel, WholeModel, Zero
    from mmit.models import build_model
    from mmit.models.placement import WHOLE, placed
    from mmit.train.allocator import memory_given_back
    from mmit.train.deepspeed_settings import deepspeed_config
    from mmit.train.engine import init_process_group
    from mmit.train.partition import Partitioned

    torch.set_num_threads(1)
    init_process_group()
    source, kept = way.split(", ")
    section = ComposedModel.model_validate_json((folder / "section.json").read_text(encoding="utf-8"))
    model = section if source == "parts" else WholeModel(path=str(folder / "saved"))
    settings = deepspeed_config(
        Zero(stage=3), dtype=torch.float32, rows_per_micro_batch=1, micro_batches=1, clip_norm=1.0
    )
    in_pieces = kept == "partitioned"  # as mmit.train.stage_parts does it
    allocator = memory_given_back() if in_pieces else nullcontext()
    with Peak() as peak, allocator, placed(Partitioned(settings) if in_pieces else WHOLE):
        loaded = build_model(model, dtype=torch.float32, seed=0)
    del loaded
    print(peak.bytes)
    torch.distributed.destroy_process_group()


class Peak:
    """The largest growth of this process's anonymous memory while in force."""

    def __enter__(self) -> Peak:
        self.bytes, self._start, self._ended = 0, _anonymous(), False
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended:
            self.bytes = max(self.bytes, _anonymous() - self._start)
            time.sleep(SAMPLE_SECONDS)


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this measurement needs Linux")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _rank(Path(sys.argv[1]), sys.argv[2])
    else:
        main()
