"""Rows of Parquet files, read a row group at a time.

A file or a folder of files is one table. Rows are cheap to read next to their neighbours only, so ``blocks`` tells
the conversion which rows lie together.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmit.data.faults import StorageError
from mmit.errors import DataError, MissingExtra

if TYPE_CHECKING:
    import pyarrow

KEPT_GROUPS = 4
"""Row groups that a process keeps in memory."""


class ParquetRows:
    """The rows of one or several Parquet files of the same set; columns may differ between files.

    columns: read these alone; empty reads all. Raises DataError, MissingExtra("pyarrow", "parquet").
    """

    def __init__(self, path: Path, columns: Sequence[str] = ()) -> None:
        self.path = path
        self.columns = list(columns)
        self.files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        if not self.files:
            raise DataError(f"{path}: there is no *.parquet file in this folder")
        self._groups: list[tuple[Path, int]] = []
        self._starts = [0]
        for file in self.files:
            metadata = _opened(file).metadata
            for group in range(metadata.num_row_groups):
                self._groups.append((file, group))
                self._starts.append(self._starts[-1] + metadata.row_group(group).num_rows)
        self._kept: OrderedDict[int, pyarrow.Table] = OrderedDict()

    def __len__(self) -> int:
        return self._starts[-1]

    def blocks(self) -> list[int]:
        """The number of rows of each row group, in order."""
        return [after - before for before, after in zip(self._starts, self._starts[1:], strict=False)]

    def read(self, number: int) -> Mapping[str, Any]:
        """One row as plain values; pictures are bytes inside it. Raises StorageError where the file is damaged."""
        group = bisect_right(self._starts, number) - 1
        table = self._table(group)
        at = number - self._starts[group]
        return {name: table.column(place)[at].as_py() for place, name in enumerate(table.column_names)}

    def column(self, name: str) -> list[Any]:
        """All values of one column. Raises DataError where a file does not have it."""
        found: list[Any] = []
        for file in self.files:
            parquet = _opened(file)
            if name not in parquet.schema_arrow.names:
                raise DataError(f"{file}: has no column '{name}'; it has {', '.join(parquet.schema_arrow.names)}")
            found += parquet.read(columns=[name], use_threads=False).column(0).to_pylist()
        return found

    def digest(self) -> str:
        """Changes with the size or the footer (names, counts and statistics of all columns) of any file."""
        state = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as content:
                content.seek(max(0, file.stat().st_size - (1 << 16)))
                state.update(f"{file.name} {file.stat().st_size}\n".encode() + content.read())
        return state.hexdigest()

    def _table(self, group: int) -> pyarrow.Table:
        if group not in self._kept:
            file, number = self._groups[group]
            wanted = self.columns or None
            try:
                self._kept[group] = _opened(file).read_row_group(number, columns=wanted, use_threads=False)
            except (OSError, ValueError) as error:  # pyarrow's own errors are kinds of these
                raise StorageError(f"{file}: row group {number} cannot be read: {error}") from None
            while len(self._kept) > KEPT_GROUPS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(group)
        return self._kept[group]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": OrderedDict()}


def _opened(file: Path) -> Any:  # noqa: ANN401  (pyarrow.parquet has no types)
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("pyarrow", "parquet", f"reading {os.path.basename(file)}") from None
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as Parquet: {error}") from None
