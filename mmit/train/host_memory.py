"""Whether a copy of the state fits beside everything else in the memory of every host."""

from __future__ import annotations

import socket
from collections import Counter
from pathlib import Path

import torch

from mmit.distributed import world_size

SPARE = 2.0
"""So many times what the copies need must be free: loaders and caches grow while a run goes on."""

_CGROUP = Path("/sys/fs/cgroup")


def copies_fit(needed: int) -> bool:
    """True where each host has room for the copies of its ranks; collective. needed: bytes of this rank's copy."""
    said: list[tuple[str, int, int]] = [(socket.gethostname(), needed, free_memory())] * world_size()
    if world_size() > 1:
        torch.distributed.all_gather_object(said, said[0])
    in_all: Counter[str] = Counter()
    for host, bytes_needed, _ in said:
        in_all[host] += bytes_needed
    return all(in_all[host] * SPARE <= free for host, _, free in said)


def free_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = _CGROUP) -> int:
    """Bytes that this process may still take: of the machine, and of its container where it has a limit.

    0 where the system does not tell.
    """
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="utf-8").splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0
    try:
        limit = (cgroup / "memory.max").read_text(encoding="utf-8").strip()
        held = int((cgroup / "memory.current").read_text(encoding="utf-8"))
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):
        return free  # no container, or one of the first version of cgroups
    if limit == "max":
        return free
    cached = int(stat.get("inactive_file", 0))  # given up when asked for
    return max(0, min(free, int(limit) - held + cached))
