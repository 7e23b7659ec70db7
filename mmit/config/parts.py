"""A part of one's own in a run file, and how parts are told apart by their ``type``."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from mmit.config.sections import Section


class CustomPart(Section):
    """An encoder or connector of one's own: ``type: package.module:Class``."""

    type: str
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class."""


def kind_of(value: object) -> str:
    """The tag of a section: its ``type``, or ``custom`` for a class of one's own."""
    kind = value.get("type", "") if isinstance(value, dict) else getattr(value, "type", "")
    return "custom" if isinstance(kind, str) and ":" in kind else str(kind)
