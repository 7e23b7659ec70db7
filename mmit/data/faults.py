"""What can be wrong with data, by who has to react.

A broken sample is left out, counted and listed; one that is not wanted is left out and counted; storage that fails
ends the run, since the sample itself may be whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmit.errors import DataError


class SampleError(DataError):
    """One record or sample is wrong; the others are not. The message is the reason alone, without its name."""


class SkippedError(DataError):
    """A record that the recipe leaves out on purpose: no fault, and counted by its reason, which is the message."""


class StorageError(DataError):
    """A file cannot be read, or is not the one that was indexed: never the fault of one sample."""


class MissingShardError(StorageError):
    """A shard is gone or cut off, and stays so after several attempts; a run may be told to go on without it."""


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """A sample that was left out: where it is and what is wrong with it.

    key: its key within the shard, or its row within the source; id: the id of the conversation where it is known.
    """

    id: str
    key: str
    shard: str
    reason: str

    def __str__(self) -> str:
        name = f" ({self.id})" if self.id else ""
        return f"{self.shard}: {self.key}{name}: {self.reason}"


def first_three(bad: list[BadSample]) -> str:
    """The first three of a list, for the sentence of an error."""
    shown = "; ".join(str(sample) for sample in bad[:3])
    return shown + (f"; and {len(bad) - 3} more" if len(bad) > 3 else "")
