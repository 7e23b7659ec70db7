"""Where models lie that are only named: whole ones, and the parts a checkpoint goes with; here or on the hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from mmit.errors import CheckpointError
from mmit.hub import revision_of

_DESCRIPTIONS = ("*.json", "*.txt", "*.jinja", "tokenizer.model")
_WEIGHTS = ("*.safetensors", "*.bin")
_BESIDE_WEIGHTS = ("mm_projector.bin", "non_lora_trainables.bin")
"""What LLaVA's original code saves beside an adapter, in whatever form that is."""
_NOT_FETCHED = (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError)
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def local_directory(name: str, beside: Path) -> Path | None:
    """The directory that ``name`` means on this machine: as it stands, or as seen from the directory ``beside``."""
    if not name:
        return None
    return next((path for path in (Path(name).expanduser(), beside / name) if path.is_dir()), None)


def part_directory(name: str, beside: Path, *, remedy: str, weights: bool = True) -> Path:
    """A directory with the files of the part ``name``, local or fetched from the hub.

    weights: False for the descriptions alone. Raises CheckpointError that ends with ``remedy``.
    """
    found = local_directory(name, beside)
    if found is not None:
        return found
    if not name or name.startswith((".", "/", "~")):
        raise CheckpointError(f"there is no directory '{name}'; {remedy}")
    try:
        return _fetched(name, weights=weights)
    except _NOT_FETCHED as error:
        raise CheckpointError(
            f"'{name}' is no directory and cannot be fetched from the hub ({_first_line(error)}); {remedy}"
        ) from error


def model_from_hub(name: str) -> Path:
    """The directory of a whole model that is named as on the hub (``llava-hf/llava-1.5-7b-hf``), fetched if need be.

    A path below a folder of this machine is no such name. Raises CheckpointError for that, and where the hub does not
    give it.
    """
    if not _HUB_NAME.fullmatch(name) or Path(name).parent.is_dir():
        told = ", but a file of this name" if Path(name).is_file() else ""
        raise CheckpointError(f"there is no model directory {name}{told}")
    try:
        return _fetched(name, weights=True)
    except _NOT_FETCHED as error:
        raise CheckpointError(
            f"there is no model directory {name}, and the hub does not give a model of this name "
            f"({_first_line(error)}); name a directory, or fetch it where there is a network"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _fetched(name: str, *, weights: bool) -> Path:
    revision = revision_of(name)
    described = [*_DESCRIPTIONS, *_BESIDE_WEIGHTS]
    directory = Path(snapshot_download(name, revision=revision, allow_patterns=described))
    if weights:
        # many repositories hold the same weights twice
        for pattern in _WEIGHTS:
            directory = Path(snapshot_download(name, revision=revision, allow_patterns=pattern))
            if any(directory.glob(pattern)):
                break
    return directory
