"""Where the parts lie that a checkpoint only names: a language model or a vision tower, here or on the hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from mmit.errors import CheckpointError

_DESCRIPTIONS = ("*.json", "*.txt", "*.jinja", "tokenizer.model")
_WEIGHTS = ("*.safetensors", "*.bin")


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
        directory = Path(snapshot_download(name, allow_patterns=list(_DESCRIPTIONS)))
        if weights:
            # many repositories hold the same weights twice
            for pattern in _WEIGHTS:
                directory = Path(snapshot_download(name, allow_patterns=pattern))
                if any(directory.glob(pattern)):
                    break
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"'{name}' is no directory and cannot be fetched from the hub ({reason}); {remedy}"
        ) from error
    return directory
