"""Which records a recipe leaves out on purpose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmit.data.faults import SampleError, SkippedError


def refuse(record: Mapping[str, Any], *, only: Mapping[str, Sequence[Any]], skip_with: Sequence[str]) -> None:
    """Let a record pass whose values are all among ``only``, and that has nothing under the keys ``skip_with``.

    Raises SkippedError; SampleError for a record without a key of ``only``.
    """
    for key in skip_with:
        if record.get(key):
            raise SkippedError(f"has '{key}'")
    for key, kept in only.items():
        if key not in record:
            raise SampleError(f"has no '{key}', which decides whether it is kept; it has {', '.join(record)}")
        if record[key] not in kept:
            raise SkippedError(f"'{key}' is {record[key]!r}")
