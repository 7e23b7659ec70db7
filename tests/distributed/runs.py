"""A tiny run file with data and parts made on the spot, and ways to start, watch and kill it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import yaml
from model_factories import tiny_model_section
from PIL import Image

from mmit.data.convert import Conversion, convert

WORDS = ("tree", "bus", "red", "a", "next", "to")


def make_records(folder: Path, *, count: int) -> Path:
    """LLaVA-format records: every fifth has no image; answers of 1 to 7 words."""
    (folder / "images").mkdir(parents=True)
    records = []
    for number in range(count):
        has_image = number % 5 > 0
        if has_image:
            colour = (number * 4 % 256, 90, 200 - number % 100)
            Image.new("RGB", (40 + number % 9, 30), colour).save(folder / "images" / f"{number}.png")
        answer = " ".join(WORDS[(number + k) % len(WORDS)] for k in range(1 + number % 7))
        question = ("<image>\n" if has_image else "") + f"What is the picture {number}?"
        record = {"id": f"r{number}", "conversations": [{"from": "human", "value": question}]}
        record["conversations"].append({"from": "gpt", "value": answer})
        records.append(record | ({"image": f"{number}.png"} if has_image else {}))
    (folder / "records.json").write_text(json.dumps(records))
    return folder / "records.json"


def make_run(folder: Path, *, records: int = 60, **changes: Any) -> Path:
    """A run file with the stages ``align`` (ZeRO-2) and ``instruct`` (ZeRO-3) over shards below ``folder``."""
    source = make_records(folder / "raw", count=records)
    convert(
        Conversion(
            reader="llava_json", source=source, target=folder / "shards", name="tiny", images=folder / "raw" / "images"
        ),
        processes=1,
        progress=False,
    )
    common = {"data": {"mix": [{"shards": str(folder / "shards")}], "workers": 1}}
    batch = {"length": 128, "tokens_per_step": 512}
    run = {
        "name": "tiny",
        "output": str(folder / "run"),
        "model": tiny_model_section(folder / "parts"),
        "launch": {"cpu_ranks": 2, "threads_per_rank": 1},
        "stages": {
            "align": {
                **common,
                "train": {"connector": 1e-2},
                "batch": batch,
                "epochs": 4,
                "save": {"every_steps": 4},
                "zero": {"stage": 2},
            },
            "instruct": {
                **common,
                "init_from": "align",
                "train": {"connector": 1e-3, "language_model": 1e-3},
                "batch": batch,
                "max_steps": 3,
                "zero": {"stage": 3},
            },
        },
        **changes,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run, sort_keys=False))
    return path


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "mmit", *words]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def mmit(*words: str, timeout: float = 240.0, **options: Any) -> "subprocess.CompletedProcess[str]":
    """The ``mmit`` command, to its end."""
    return subprocess.run(
        command(*words), env=environment(), capture_output=True, text=True, timeout=timeout, check=False, **options
    )


def metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def start_and_wait_for_step(folder: Path, step: int, *words: str) -> "subprocess.Popen[str]":
    """Start ``mmit`` and come back as soon as the log of ``folder`` holds ``step``."""
    started = subprocess.Popen(
        command(*words), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_step(folder, step, started)
    return started


def wait_for_step(folder: Path, step: int, started: "subprocess.Popen[str]") -> None:
    """Come back as soon as the log of ``folder`` holds ``step``."""
    deadline = time.monotonic() + 180
    while started.poll() is None and time.monotonic() < deadline:
        if any(line["step"] >= step for line in metrics(folder)[-1:]):
            return
        time.sleep(0.005)
    output = (started.communicate()[0] or "") if started.poll() is not None else "(still running)"
    raise AssertionError(f"step {step} was not seen: {output[-2000:]}")


def rank_processes(started: "subprocess.Popen[str] | subprocess.Popen[bytes]") -> list[psutil.Process]:
    """The rank processes of a launch, by rank."""
    found: dict[int, psutil.Process] = {}
    for child in psutil.Process(started.pid).children():
        try:
            number = child.environ().get("RANK", "")  # empty in a process that is only just being made
        except psutil.NoSuchProcess:
            continue
        if number and "mmit" in " ".join(child.cmdline()):
            found[int(number)] = child
    return [found[number] for number in sorted(found)]
