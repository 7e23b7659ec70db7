"""How LLaVA's original code prepares pictures, as an ``ImageSpec``: to the bit, so resized by Pillow.

Pinpoints are (width, height) there as here; transformers alone turns them round.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from mmit.errors import CheckpointError, ConfigError
from mmit.images import ImageSpec
from mmit.models.encoders import ImageInput
from mmit.models.formats.contents import Json
from mmit.tiling import Anyres

_RANGE = re.compile(r"\((\d+)x(\d+)\)")


def original_spec(
    config: Json, processor: Mapping[str, Any], image: ImageInput, tokens: int, *, where: Path
) -> ImageSpec:
    """The spec that config.json says; processor: the vision tower's settings. Raises CheckpointError."""
    ratio, merge = str(config.get("image_aspect_ratio", "square")), config.get("mm_patch_merge_type", "flat")
    common: dict[str, Any] = {
        "size": image.size,
        "mean": image.mean,
        "std": image.std,
        "exact": True,
        "tokens_per_tile": tokens,
    }
    if ratio == "pad" and merge == "flat":
        return ImageSpec(resize="pad", **common)
    if ratio == "square" and merge == "flat":
        return ImageSpec(resize="crop" if processor.get("do_center_crop") else "squash", **common)
    most = ratio.removeprefix("anyres_max_")
    if merge not in ("flat", "spatial_unpad") or not (ratio == "anyres" or most.isdecimal()):
        raise CheckpointError(
            f"{where}/config.json: image_aspect_ratio {ratio} with mm_patch_merge_type {merge} is not supported; pad "
            "and square with flat, anyres and anyres_max_N with flat or spatial_unpad are"
        )
    shrink_to = int(most) if most.isdecimal() else 0
    try:
        tiling = Anyres(
            pinpoints=_pinpoints(config.get("image_grid_pinpoints"), image.size[0]),
            unpad=merge == "spatial_unpad",
            shrink_to=shrink_to,
            several="whole" if shrink_to else "tiled",
        )
        return ImageSpec(resize="pad", tiling=tiling, **common)
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}/config.json: image_grid_pinpoints cannot be read: {error}") from error


def original_fields(spec: ImageSpec) -> Json:
    """The fields of config.json that say ``spec``; ``original_spec`` reads them back."""
    tiling = spec.tiling
    if isinstance(tiling, Anyres):
        return {
            "image_aspect_ratio": f"anyres_max_{tiling.shrink_to}" if tiling.shrink_to else "anyres",
            "image_grid_pinpoints": [list(pair) for pair in tiling.pinpoints],
            "mm_patch_merge_type": "spatial_unpad" if tiling.unpad else "flat",
        }
    return {"image_aspect_ratio": "pad" if spec.resize == "pad" else "square", "mm_patch_merge_type": "flat"}


def _pinpoints(listed: object, side: int) -> tuple[tuple[int, int], ...]:
    """Pairs as they are listed, or the range of grids ``(1x1),...,(6x6)`` in tiles of ``side`` pixels."""
    if isinstance(listed, str):
        ends = [(int(across), int(down)) for across, down in _RANGE.findall(listed)]
        first, last = ends[0] if ends else (0, 0), ends[-1] if ends else (0, 0)
        grids = product(range(first[0], last[0] + 1), range(first[1], last[1] + 1))
        return tuple((across * side, down * side) for across, down in grids)
    if not isinstance(listed, list):
        raise TypeError(f"it is {listed}, not a list of pairs")
    return tuple((int(across), int(down)) for across, down in listed)
