"""A user's own reader: ``package.module:function`` in a recipe.

    def my_reader(source: Path, **options) -> Sequence | Iterable

It gives records in OpenAI's or LLaVA's form (mappings with ``messages`` or ``conversations``; pictures as paths, data
URLs or bytes). A sequence is asked for one record at a time by several processes; anything else is read once and kept.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmit.data import forms, rows
from mmit.data.faults import SampleError
from mmit.data.sources.instructions import InstructionOptions, reading
from mmit.errors import DataError


def open_custom(reader: str, source: Path, options: Mapping[str, Any]) -> tuple[rows.Rows, forms.Parse]:
    """The records that the function ``reader`` gives. Raises DataError where there is no such function."""
    module_name, _, name = reader.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)  # the command line does not see the working directory by itself
    try:
        function = getattr(importlib.import_module(module_name), name)
    except ModuleNotFoundError as error:
        if error.name and not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise
        raise DataError(f"reader '{reader}': there is no module '{module_name}' here or among the packages") from None
    except AttributeError:
        raise DataError(f"reader '{reader}': the module {module_name} has no '{name}'") from None
    records = function(source, **options)
    if not isinstance(records, Iterable | Sequence):
        raise DataError(f"reader '{reader}': gave {type(records).__name__}; it has to give records")
    found = records if isinstance(records, Sequence) else list(records)
    return _Records(found, f"{reader} {sorted(options.items())}", source), reading(InstructionOptions())


class _Records:
    def __init__(self, records: Sequence[Any], name: str, source: Path) -> None:
        self.records, self.name, self.source = records, name, source

    def __len__(self) -> int:
        return len(self.records)

    def read(self, number: int) -> Mapping[str, Any]:
        record = self.records[number]
        if not isinstance(record, Mapping):
            raise SampleError(f"the record is {type(record).__name__}, not a mapping")
        return record

    def digest(self) -> str:
        """Changes with the function's name, its options, the number of records and the source's size and time."""
        state = self.source.stat()
        text = f"{self.name} {len(self)} {state.st_size} {state.st_mtime_ns}"
        return hashlib.sha256(text.encode()).hexdigest()
