"""The ``options`` of a recipe, checked against the dataclass of the reader they are for."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from mmit.errors import DataError

Kind = TypeVar("Kind")


def split_options(given: Mapping[str, Any], kinds: tuple[type, ...], *, place: str) -> list[dict[str, Any]]:
    """The options that belong to each of the dataclasses ``kinds``. Raises DataError for a key that none has."""
    known = {field.name: number for number, kind in enumerate(kinds) for field in fields(cast("Any", kind))}
    parts: list[dict[str, Any]] = [{} for _ in kinds]
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"it knows {', '.join(sorted(known))}"
            raise DataError(f"{place} has no option '{key}'; {hint}")
        parts[known[key]][key] = value
    return parts


def checked(kind: type[Kind], given: Mapping[str, Any], *, place: str) -> Kind:
    """``kind`` made of ``given``, with the types of its fields. Raises DataError naming the option."""
    typed = with_config(ConfigDict(extra="forbid", strict=False))(kind)
    try:
        return TypeAdapter(typed).validate_python(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "its options"
        raise DataError(f"{place}: option '{where}': {first['msg']}; it is {first['input']!r}") from None
