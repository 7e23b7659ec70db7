"""What all sections of a run file share: frozen models that refuse unknown keys, and their number types."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator

_COUNT = re.compile(r"(\d+)\s*([kKmM]?)")


def parse_count(value: object) -> object:
    """``"160k"`` -> 163840: k is 1024 and m is 1024 squared, as in context lengths."""
    if isinstance(value, str) and (match := _COUNT.fullmatch(value.strip())):
        return int(match[1]) * {"": 1, "k": 1024, "m": 1024 * 1024}[match[2].lower()]
    return value


MANY = 10_000
"""Most epochs; a typing mistake beyond it would plan for ever."""

Count = Annotated[PositiveInt, BeforeValidator(parse_count)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """What all sections share: frozen, no unknown keys, docstrings under fields are their documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, content: object) -> object:
        """YAML's yes, no, true and false would pass as 1 and 0."""
        if isinstance(content, dict):
            for name, field in cls.model_fields.items():
                if isinstance(content.get(name), bool) and field.annotation in (int, float):
                    raise ValueError(f"{name}: {str(content[name]).lower()} is no number")
        return content
