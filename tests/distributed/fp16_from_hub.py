"""Run on one rank: a stage in fp16 whose language model has a name on the hub, whole, and continued from step 2.

Between the two the hub's newest revision of that model becomes another one. Prints the lines of metrics of both,
whether the models are the same in every bit, the revisions that were written, and the log of the second.
"""

import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ |= {"HF_HOME": sys.argv[2], "HF_HUB_OFFLINE": "1"}  # read when the packages are imported

import torch
from deepspeed.accelerator import get_accelerator

from mmit.config import load_config
from mmit.train.stage import train_stage

TOLD = ("step", "loss", "grad_norm", "loss_scale", "left_out_in_all", "samples_digest")


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: line.get(key) for key in TOLD} for line in found]


def weights(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted((folder / "model").glob("*.safetensors"))]


def main(run_file: str, home: str) -> None:
    # torch computes fp16 on every CPU, slowly; DeepSpeed asks for fast kernels
    get_accelerator().is_fp16_supported = lambda: True
    config = load_config(Path(run_file), [])
    folder = config.stage_folder("align")
    with patch.object(torch.distributed, "destroy_process_group"):  # DeepSpeed does not make a second one
        train_stage(config, "align")
        whole, model = lines(folder), weights(folder)
        facts = json.loads((folder / "model" / "mmit.json").read_text())["made_from"]
        shutil.rmtree(folder / "model")
        for checkpoint in (folder / "checkpoints").glob("step-*"):
            if checkpoint.name != "step-000002":
                shutil.rmtree(checkpoint)
        [newest] = Path(home).glob("hub/models--*/refs/main")
        newest.write_text("b" * 40)
        records: list[str] = []
        logging.getLogger("mmit").addFilter(lambda record: records.append(record.getMessage()) is None)
        train_stage(config, "align")
    result = {"whole": whole, "continued": lines(folder), "same_bits": weights(folder) == model}
    print(json.dumps(result | {"revisions": facts["revisions"], "log": records}))


if __name__ == "__main__":
    main(*sys.argv[1:])
