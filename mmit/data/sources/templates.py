"""Texts with places for the fields of a record: ``{name}``, ``{image_id:012d}``, ``{hint|N/A}`` (where it is empty).

A name may hold spaces (``{Choice A}``). Nothing but these three forms is understood, so a text from a stranger's
recipe can do nothing but show fields.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mmit.data.faults import SampleError

_PLACE = re.compile(r"\{([A-Za-z_][\w .-]*)(?::(0?\d+)d)?(?:\|([^{}]*))?\}")


def fill(template: str, record: Mapping[str, Any]) -> str:
    """The template with the fields of ``record``. Raises SampleError for a field that is not there."""

    def value(place: re.Match[str]) -> str:
        name, width, otherwise = place.groups()
        found = record.get(name)
        if otherwise is not None and (found is None or not str(found).strip()):
            return otherwise
        if found is None:
            raise SampleError(f"has no '{name}'; it has {', '.join(key for key in record if record[key] is not None)}")
        if width is None:
            return str(found)
        try:
            return f"{int(found):{width}d}"
        except (TypeError, ValueError):
            raise SampleError(f"'{name}' is {found!r}, not a number") from None

    return _PLACE.sub(value, template)
