"""The errors a user can cause or meet, and the exit codes of the command line.

    MmitError
    +-- ConfigError       a run file, an override or an option is wrong
    +-- DataError         a record, an image, a shard or a data set is wrong
    +-- CheckpointError   a model directory, a weight file or a checkpoint is wrong
    +-- TrainingError     a run cannot go on: a NaN, a step without trained tokens, a rank that died
    +-- MissingExtra      an optional package is not installed; the message names the extra

Each carries one sentence that names the file, key or record and the remedy. The command line prints that sentence
and exits with ``exit_code``; a traceback is for our own mistakes only.
"""

EXIT_USER_ERROR = 2
"""The input was wrong, the message says what to change."""

EXIT_INTERRUPTED = 75
"""SIGTERM or Ctrl-C: what was done is saved; the same command goes on from there (``EX_TEMPFAIL`` of sysexits.h)."""


class MmitError(Exception):
    """A failure that the user can mend; ``str(error)`` is the sentence to show."""

    exit_code: int = EXIT_USER_ERROR


class ConfigError(MmitError):
    """A run file, an override or a command-line option is wrong."""


class DataError(MmitError):
    """A record, an image, a shard or a data set is wrong."""


class CheckpointError(MmitError):
    """A model directory, a weight file or a checkpoint is missing, incomplete or does not fit."""


class TrainingError(MmitError):
    """A run cannot go on: the loss is not finite, a step has no trained token, a rank died."""

    exit_code = 1


class MissingExtra(MmitError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package '{package}': pip install 'mmit[{extra}]'")


class OtherRankFailed(MmitError):
    """Another rank failed and says why; this one ends with it."""


class Interrupted(MmitError):
    """The run was asked to stop, and what it had done is saved."""

    exit_code = EXIT_INTERRUPTED
