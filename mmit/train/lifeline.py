"""The pipe between the process that launches ranks and each of them: an error goes up, the launcher's end is felt.

A pipe leaves nothing behind, however its two ends are killed. Ranks of another launcher (``deepspeed``, ``torchrun``,
SLURM) have none, and speak for themselves.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys

from mmit.errors import EXIT_INTERRUPTED

VARIABLE = "MMIT_LAUNCHER"
"""Names the rank's end of the pipe in its environment."""
_MOST_BYTES = 60_000
"""What a pipe takes while nobody reads it."""


class Lifeline:
    """The launcher's end of the pipe to one rank. end: the other one, to be passed on when the rank is started."""

    def __init__(self) -> None:
        self._own, self.end = os.pipe()
        os.set_blocking(self._own, False)

    def told(self) -> str:
        """What the rank has said, once it is gone."""
        try:
            return os.read(self._own, _MOST_BYTES).decode(errors="replace")
        except BlockingIOError:  # nothing, and a process that read data for it has not ended yet
            return ""

    def close(self) -> None:
        """Let go of both ends; a rank that still runs has no launcher from now on."""
        os.close(self._own)
        os.close(self.end)


def note_error(message: str) -> bool:
    """Tell the launcher an error of this rank; False where there is none to hear it."""
    if (end := _own_end()) is None:
        return False
    try:
        os.write(end, message.encode()[:_MOST_BYTES])
    except OSError:  # the launcher was killed
        return False
    return True


def end_with_launcher() -> None:
    """Ask Linux for a SIGTERM when the launcher is gone, so that a killed one leaves no rank behind.

    Ends this process where it is gone already.
    """
    if (end := _own_end()) is None or sys.platform != "linux":
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    look = select.poll()
    look.register(end, 0)
    if any(event & (select.POLLERR | select.POLLNVAL) for _, event in look.poll(0)):
        sys.exit(EXIT_INTERRUPTED)


def _own_end() -> int | None:
    value = os.environ.get(VARIABLE, "")
    return int(value) if value.isdigit() else None
