"""Which revision of a name on the hub is read: the newest, or the one that a run began with.

All that read from the hub ask ``revision_of``; a run puts what it found before in force, so that a model that has
changed there in the meantime does not come in half-way.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

logger = logging.getLogger("mmit")

NEWEST = "main"
"""The branch that the hub gives where no revision is asked for."""


@dataclass
class Revisions:
    """What is pinned (name -> commit), and what was read since."""

    pinned: Mapping[str, str] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)

    def commits(self) -> dict[str, str]:
        """Name -> commit of everything that was read from the hub, as its cache on this machine tells; also logged."""
        from huggingface_hub import try_to_load_from_cache

        found = {}
        for name in sorted(self.read):
            if Path(name).expanduser().exists() or name.count("/") > 1:
                continue  # a directory of this machine, whatever the hub has under its name
            file = try_to_load_from_cache(name, "config.json", revision=self.pinned.get(name, NEWEST))
            if isinstance(file, str):
                found[name] = Path(file).parent.name
                before = ", as when this began" if name in self.pinned else ""
                logger.info("%s: revision %s of the hub%s", name, found[name][:12], before)
        return found


_in_force: ContextVar[Revisions | None] = ContextVar("revisions", default=None)


def revision_of(name: str | Path) -> str:
    """The revision to read of ``name``, which may also be a directory, where it means nothing."""
    revisions = _in_force.get()
    if revisions is None:
        return NEWEST
    revisions.read.add(str(name))
    return revisions.pinned.get(str(name), NEWEST)


@contextmanager
def pinning(pinned: Mapping[str, str]) -> Generator[Revisions]:
    """While in force, names are read at the commits ``pinned``; gives what notes the names that are read."""
    revisions = Revisions(pinned)
    token = _in_force.set(revisions)
    try:
        yield revisions
    finally:
        _in_force.reset(token)
