"""Runs a Python function's module on several real ranks over gloo and gathers what rank 0 printed."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(number: int, ranks: int, port: int) -> dict[str, str]:
    return {
        **os.environ,
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu"),
        "PYTHONPATH": f"{TESTS}:{os.environ.get('PYTHONPATH', '')}",
    }


def run_ranks(script: Path, *arguments: str, ranks: int = 2, timeout: float = 540.0) -> Any:
    """Start ``script`` on ``ranks`` processes; the last line of rank 0's output, read as JSON."""
    port = free_port()
    children = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), *arguments],
            env=rank_environment(number, ranks, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(ranks)
    ]
    try:
        outputs = [child.communicate(timeout=timeout) for child in children]
    finally:
        for child in children:
            child.kill()
    for child, (_, err) in zip(children, outputs, strict=True):
        assert child.returncode == 0, err[-3000:]
    return json.loads(outputs[0][0].strip().splitlines()[-1])
