"""Weights in PyTorch's own files (``*.bin``): read without running anything that is in them.

Such a file is a pickle, which can call any function when it is opened. torch's restricted reader knows tensors and
plain containers only; whatever else a file asks for is refused here with the reason.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from mmit.errors import CheckpointError

_ASKED_FOR = re.compile(r"GLOBAL ([\w.]*\w)")


def read_pickled(file: Path, *, inside: str = "") -> dict[str, Tensor]:
    """The tensors of a ``*.bin`` file by name, memory-mapped.

    inside: the entry of the file's dictionary that holds them, where it has one of this name.

    Raises CheckpointError for a file that is damaged, holds anything but tensors, or asks for code to be run.
    """
    try:
        # Files older than torch 1.6 are no zip archives and cannot be mapped.
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        asked = _ASKED_FOR.search(str(error))
        if asked is None:
            raise CheckpointError(f"{file} is damaged, or no file of tensors; copy or make it again") from error
        raise CheckpointError(
            f"{file} is a pickle that asks for more than tensors ({asked[1]}); it may carry code and was not opened: "
            "take the weights from a source you trust, as safetensors"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError, IndexError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{file} is damaged or incomplete ({reason}); copy or make it again") from error
    if inside and isinstance(content, dict):
        content = content.get(inside, content)
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not tensors by their names")
    if strangers := [str(name) for name, value in content.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(
            f"{file} holds more than tensors by their names ({', '.join(strangers[:3])}): it is no file of weights"
        )
    return content
