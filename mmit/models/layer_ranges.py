"""Rules that name layers by number: ``vision_tower.layers.12-``, ``language_model.layers.0-3``.

Layers are numbered from 0, as in the names of their parameters, whatever each library calls them. Of several encoders,
``vision_tower.layers`` means the layers of each, ``vision_tower.1.layers`` those of the second.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from mmit.errors import ConfigError
from mmit.models.absent import frame_of
from mmit.models.encoders import FusedTower, LayeredTower

_RANGE = re.compile(r"(vision_tower|language_model)(?:\.(\d+))?\.layers\.(\d+)(?:(-)(\d*))?")


@dataclass(frozen=True)
class LayerRange:
    """Layers ``first`` to ``last`` of a part, both included; last None: to the end; encoder: one of several."""

    part: str
    encoder: int | None
    first: int
    last: int | None


def parse_range(pattern: str) -> LayerRange | None:
    """The layers that a rule names: ``12-`` and later, ``0-3``, or ``5`` alone; None for a rule of another kind."""
    found = _RANGE.fullmatch(pattern)
    if found is None:
        return None
    part, encoder, first, dash, last = found.groups()
    until = int(last) if last else (None if dash else int(first))
    return LayerRange(part, None if encoder is None else int(encoder), int(first), until)


def names_in_range(model: nn.Module, pattern: str, layers: LayerRange, names: list[str]) -> list[str]:
    """Those of the parameters ``names`` in these layers. Raises ConfigError, with the layers there are, for none."""
    names = [name for name in names if name.startswith(f"{layers.part}.")]
    lists = _layer_lists(frame_of(model.get_submodule(layers.part)), layers.part, names)
    if layers.encoder is not None:
        lists = lists[layers.encoder : layers.encoder + 1] if layers.part == "vision_tower" and len(lists) > 1 else []
    chosen = [
        name for name in names if any(_is_within(_number(name, start), layers) for start in lists if start is not None)
    ]
    if not chosen:
        raise ConfigError(f"train: the rule '{pattern}' matches no layer; {_what_there_is(layers.part, lists, names)}")
    return chosen


def _layer_lists(part: nn.Module, name: str, names: Iterable[str]) -> list[str | None]:
    """The beginnings of the names of a part's layers, one for each encoder; None where it has no numbered ones."""
    if isinstance(part, FusedTower):
        lists: list[str | None] = []
        for number, tower in enumerate(part.towers):
            below = f"{name}.towers.{number}"
            lists += _layer_lists(tower, below, [n for n in names if n.startswith(f"{below}.")])
        return lists
    if isinstance(part, LayeredTower):
        return [f"{name}.{part.blocks}."]
    return [_longest_list(name, names)]


def _longest_list(part: str, names: Iterable[str]) -> str | None:
    """What stands before the number in the longest numbered list directly in a part, such as ``...model.layers.``."""
    numbers: defaultdict[str, set[str]] = defaultdict(set)
    for name in names:
        if found := re.match(r"(.*?\.)(\d+)\.", name.removeprefix(part)):
            numbers[part + found[1]].add(found[2])
    return max(numbers, key=lambda start: len(numbers[start]), default=None)


def _number(name: str, start: str) -> int | None:
    return int(name.removeprefix(start).partition(".")[0]) if name.startswith(start) else None


def _is_within(number: int | None, layers: LayerRange) -> bool:
    return number is not None and layers.first <= number and (layers.last is None or number <= layers.last)


def _what_there_is(part: str, lists: list[str | None], names: list[str]) -> str:
    depths = [1 + max(n for name in names if (n := _number(name, start)) is not None) for start in lists if start]
    if not depths:
        return f"{part} has no such numbered layers"
    return " and ".join(f"{part} has {depth} layers, 0 to {depth - 1}" for depth in depths)
