"""Which parameters train, and at which learning rate."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from mmit.errors import ConfigError
from mmit.models.adapter_names import is_adapter, plain_name
from mmit.models.layer_ranges import names_in_range, parse_range

PARTS = {
    "connector": ("multi_modal_projector.", "image_newline"),
    "language_model": ("language_model.",),
    "vision_tower": ("vision_tower.",),
}
"""Part names of a rule, and the beginnings of the parameter names they stand for."""

LORA = "lora"
"""The rule for the parameters of an adapter; no other rule reaches them but an expression that says ``lora_``."""

NEW_TOKENS = "new_tokens"
"""The rule for the rows of tokens that the run file added; all other rows of the tables stay as they are."""


@dataclass(frozen=True)
class TrainGroup:
    """The parameters that one rule decides: its pattern as written, the learning rate, the parameter names."""

    pattern: str
    lr: float
    names: tuple[str, ...]


def apply_rules(
    model: nn.Module,
    rules: Mapping[str, float],
    *,
    idle: frozenset[str] = frozenset(),
    unused: Callable[[], set[str]],
    absent: Sequence[str] = (),
    rows: Sequence[str] = (),
) -> list[TrainGroup]:
    """Set ``requires_grad`` of every parameter by ``rules`` and return one group per rule that trains something.

    idle: parameters that no output depends on; they are never trained (an optimizer would only decay them). unused:
    gives those of the tower, asked only when it is to be trained. absent: names of parameters that are not there, since
    their outputs are read from disk; ``check_frozen`` has been asked about them. rows: the tables with the rows of new
    tokens. Raises ConfigError for a rule that matches nothing.
    """
    names = [*(name for name, _ in model.named_parameters()), *absent]
    winner: dict[str, str] = {}
    matched: dict[str, list[str]] = {}
    for pattern in rules:
        matched[pattern] = list(rows) if pattern == NEW_TOKENS else _matches(model, pattern, names)
        if not matched[pattern]:
            parts = ", ".join((*PARTS, LORA, NEW_TOKENS))
            raise ConfigError(f"train: the rule '{pattern}' matches no parameter (part names are {parts})")
        winner.update(dict.fromkeys(matched[pattern], pattern))
    (tower,) = PARTS["vision_tower"]
    if any(name.startswith(tower) and rules[rule] > 0 for name, rule in winner.items()):
        idle |= unused()
    for pattern, found in matched.items():
        if rules[pattern] > 0 and idle.issuperset(found):
            raise ConfigError(
                f"train: the rule '{pattern}' matches only parameters that do nothing, such as those behind "
                "model.encoder.layer"
            )
    trained = {name for name, rule in winner.items() if rules[rule] > 0} - idle
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    groups = [
        TrainGroup(pattern, lr, tuple(name for name in names if name in trained and winner[name] == pattern))
        for pattern, lr in rules.items()
    ]
    return [group for group in groups if group.names]


def check_frozen(rules: Mapping[str, float], tower: nn.Module, *, adapted: Sequence[str] = ()) -> None:
    """Raise ConfigError where a rule trains a tower whose outputs are read from disk.

    tower: a module with the tower as its child ``vision_tower``. adapted: patterns of layers that get an adapter.
    """
    layers = [name.rpartition(".")[0] for name, _ in tower.named_parameters()]
    if target := next((pattern for pattern in adapted if _matches_in(tower, pattern, layers)), None):
        raise ConfigError(
            f"lora.targets: '{target}' means layers of the vision tower, whose outputs are read from data.features; "
            "leave them out, or set data.features to none"
        )
    if rule := training_rule(rules, tower):
        raise ConfigError(
            f"train: the rule '{rule}' trains the vision tower, whose outputs are read from data.features; freeze it, "
            "or set data.features to none"
        )


def training_rule(rules: Mapping[str, float], model: nn.Module) -> str | None:
    """The rule that trains a parameter of ``model``, which may hold some of the parts only; None for frozen ones."""
    names = [name for name, _ in model.named_parameters()]
    winner = {name: pattern for pattern in rules for name in _matches_in(model, pattern, names)}
    return next((pattern for pattern in winner.values() if rules[pattern] > 0), None)


def _matches_in(model: nn.Module, pattern: str, names: list[str]) -> list[str]:
    """As ``_matches`` for a model that holds some of the parts only."""
    named = parse_range(pattern)
    return [] if named is not None and not hasattr(model, named.part) else _matches(model, pattern, names)


def _matches(model: nn.Module, pattern: str, names: list[str]) -> list[str]:
    if pattern == LORA:
        return [name for name in names if is_adapter(name)]
    wants_adapter = "lora_" in pattern
    names = [name for name in names if is_adapter(name) == wants_adapter]
    if layers := parse_range(pattern):
        return names_in_range(model, pattern, layers, names)
    if pattern in PARTS:
        return [name for name in names if name.startswith(PARTS[pattern])]
    return [name for name in names if re.search(pattern, plain_name(name))]
