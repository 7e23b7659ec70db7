"""Offloading to a local disk (ZeRO-Infinity, arXiv 2104.07857): whether this machine can, and where a stage does it.

DeepSpeed moves tensors with an operation of its own, ``async_io``, which is compiled on first use against libaio and
reads and writes past the page cache. All of that is tried before a part is loaded.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator

from mmit.config import RunConfig, Zero
from mmit.distributed import local_rank, logger, rank
from mmit.errors import ConfigError


def zero_of(config: RunConfig, name: str) -> Zero:
    """The ``zero`` section of a stage, its ``nvme_path`` being a folder of this stage of this run alone."""
    zero = config.stages[name].zero
    if zero.nvme_path is None:
        return zero
    where = hashlib.blake2b(str(config.stage_folder(name).resolve()).encode(), digest_size=4).hexdigest()
    folder = Path(zero.nvme_path).expanduser().resolve() / f"mmit-{config.name}-{name}-{where}"
    return zero.model_copy(update={"nvme_path": str(folder)})


def can_build() -> bool:
    """Whether a small program that uses libaio compiles and links on this machine."""
    return _builder().is_compatible(verbose=False)


def _builder() -> Any:  # noqa: ANN401 - DeepSpeed's builders of each accelerator
    return get_accelerator().create_op_builder("AsyncIOBuilder")


def prepare(zero: Zero, *, where: str) -> None:
    """Make the folder of ``zero_of`` and DeepSpeed's operation ready; nothing to do where none is asked for.

    where: the section in the run file. Raises ConfigError where this machine cannot offload to that folder.
    """
    if zero.nvme_path is None:
        return
    if not can_build():
        raise ConfigError(
            f"{where}: offloading to nvme needs DeepSpeed's async_io, which does not build here; install a C++ "
            "compiler and the headers of libaio (apt install g++ ninja-build libaio-dev; dnf install libaio-devel), "
            "or take cpu"
        )
    folder = Path(zero.nvme_path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{rank()}"
        os.close(os.open(probe, os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"{where}.nvme_path: {folder} cannot be used ({error.strerror}); name a folder on a local disk that takes "
            "direct writes, which memory and network file systems may not"
        ) from None
    if local_rank() == 0:
        logger.info("DeepSpeed's async_io: compiled on first use, which takes minutes")
    try:
        _builder().load(verbose=False)
    except (RuntimeError, ImportError, OSError) as error:  # what torch's builder raises for a failed build
        raise ConfigError(
            f"{where}: DeepSpeed's async_io does not build here ({' '.join(str(error).split())[:200]}); "
            "mend the compiler or take cpu"
        ) from None


def remove(zero: Zero) -> None:
    """Take away what this rank offloaded; a stage that was killed leaves it for its next start."""
    if zero.nvme_path is None:
        return
    folder = Path(zero.nvme_path)
    for own in sorted(folder.glob(f"*/*/rank{rank()}")):
        shutil.rmtree(own, ignore_errors=True)
    for parent in [*sorted(folder.glob("*/*")), *sorted(folder.glob("*")), folder]:
        with suppress(OSError):  # the last rank empties it
            parent.rmdir()
