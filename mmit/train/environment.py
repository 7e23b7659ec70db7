"""What this machine offers to a run, and what stands in its way: ``mmit doctor``."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

GIB = 2**30
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - only looked at
LITTLE_SHARED_MEMORY = 2 * GIB
"""Loader workers hand over batches through /dev/shm; containers often have 64 MB of it."""
LITTLE_DISK = 20 * GIB
FEW_FILES = 4096


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Facts about a machine, as plain values; ``advice`` is a sentence for each thing that should be otherwise."""

    platform: dict[str, Any]
    packages: dict[str, str]
    extras: dict[str, str]
    devices: list[dict[str, Any]]
    attention: dict[str, Any]
    backends: dict[str, bool]
    memory: dict[str, float]
    disk: dict[str, float]
    threads: dict[str, Any]
    advice: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def look(*, cache: Path) -> Environment:
    """The environment of this process; ``cache``: the folder whose disk is looked at beside the current one."""
    import torch

    packages, extras, missing = _packages()
    devices = _devices()
    memory = {"total_gib": total_memory() / GIB, "shared_gib": _free(SHARED_MEMORY) / GIB}
    disk = {"here_gib": _free(Path.cwd()) / GIB, "cache_gib": _free(cache.expanduser()) / GIB}
    threads = {
        "cores": os.cpu_count() or 1,
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "torch_threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }
    return Environment(
        platform={
            "mmit": version("mmit"),
            "python": platform.python_version(),
            "system": platform.platform(),
            "executable": sys.executable,
            "torch_cuda": torch.version.cuda or "none",
        },
        packages=packages,
        extras=extras,
        devices=devices,
        attention=_attention(bool(devices)),
        backends=_backends(),
        memory=memory,
        disk=disk,
        threads=threads,
        advice=[*missing, *_advice(devices, memory, disk, threads, extras)],
    )


def _packages() -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Versions of what mmit needs, which extras are there, and a sentence for each package that is too old."""
    from packaging.requirements import Requirement

    needed: dict[str, str] = {}
    lacking: dict[str, list[str]] = {}
    wrong: list[str] = []
    for line in requires("mmit") or []:
        requirement = Requirement(line)
        named = re.search(r'extra == "(\w+)"', str(requirement.marker or ""))
        extra = named[1] if named else ""
        if extra == "dev":
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = ""
        if extra:
            lacking.setdefault(extra, [])
            if not found:
                lacking[extra].append(requirement.name)
        else:
            needed[requirement.name] = found or "missing"
        if found and not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} is {found}, mmit needs {requirement.specifier}: pip install '{line}'")
    extras = {name: f"lacks {', '.join(names)}" if names else "installed" for name, names in lacking.items()}
    return needed, extras, wrong


def _devices() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        found.append(
            {
                "name": properties.name,
                "memory_gib": properties.total_memory / GIB,
                "capability": f"{properties.major}.{properties.minor}",
                "bf16": torch.cuda.is_bf16_supported(),
            }
        )
    return found


def _attention(has_devices: bool) -> dict[str, Any]:
    import torch

    kernels = torch.backends.cuda
    return {
        "packed_rows": "mmit_packed: sdpa sample by sample",
        "sdpa_flash": has_devices and kernels.flash_sdp_enabled(),
        "sdpa_memory_efficient": has_devices and kernels.mem_efficient_sdp_enabled(),
        "sdpa_math": kernels.math_sdp_enabled(),
        "flash_attn": find_spec("flash_attn") is not None,
    }


def _backends() -> dict[str, bool]:
    from torch import distributed

    names = {"gloo": distributed.is_gloo_available(), "nccl": distributed.is_nccl_available()}
    return {**names, "mpi": distributed.is_mpi_available()}


def total_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _free(folder: Path) -> int:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _advice(
    devices: list[dict[str, Any]],
    memory: dict[str, float],
    disk: dict[str, float],
    threads: dict[str, Any],
    extras: dict[str, str],
) -> Iterator[str]:
    import torch

    if not devices:
        if torch.version.cuda and Path("/dev/nvidiactl").exists():
            yield "there is an NVIDIA device but torch cannot use it: compare the driver with torch's CUDA version"
        yield "no accelerator: training runs in fp32 on CPU ranks (launch.cpu_ranks), which is for trials only"
    for number, device in enumerate(devices):
        if not device["bf16"]:
            yield f"device {number} ({device['name']}) computes no bf16: set precision: fp32"
    if memory["shared_gib"] * GIB < LITTLE_SHARED_MEMORY:
        yield (
            f"{SHARED_MEMORY} has {memory['shared_gib']:.2f} GiB, through which loader workers hand over batches: give "
            "a container --shm-size=16g, or set data.workers: 0"
        )
    for place, folder in (("here_gib", "the current folder"), ("cache_gib", "the cache folder")):
        if disk[place] * GIB < LITTLE_DISK:
            yield f"{disk[place]:.1f} GiB are free in {folder}: a checkpoint takes up to 14 bytes for each parameter"
    if threads["open_files"] < FEW_FILES:
        yield f"only {threads['open_files']} files may be open at a time: ulimit -n {FEW_FILES}"
    for extra, state in sorted(extras.items()):
        if state != "installed":
            yield f"the extra '{extra}' {state}: pip install 'mmit[{extra}]' where it is wanted"
