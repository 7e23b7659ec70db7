"""A user's own encoder or connector, named in a run file as ``package.module:Class``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from mmit.errors import ConfigError


def make_custom(reference: str, arguments: Mapping[str, Any], *, key: str) -> nn.Module:
    """``Class(**arguments)`` for ``package.module:Class``; raises ConfigError that names ``key``."""
    module_name, _, class_name = reference.partition(":")
    try:
        made = getattr(importlib.import_module(module_name), class_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{key}.type: {reference}: there is no module '{error.name}' on the import path") from error
    except AttributeError as error:
        raise ConfigError(f"{key}.type: {reference}: '{module_name}' has no '{class_name}'") from error
    try:
        part = made(**arguments)
    except TypeError as error:
        raise ConfigError(f"{key}.args: {reference}: {error}") from error
    if not isinstance(part, nn.Module):
        raise ConfigError(f"{key}.type: {reference} is no torch.nn.Module")
    return part
