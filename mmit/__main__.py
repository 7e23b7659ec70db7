"""The ``mmit`` command, which Ctrl-C ends with a word at any time, also while Python reads its modules."""

import sys

INTERRUPTED = 130
"""What a shell gives for a command that Ctrl-C ended."""


def main() -> None:
    """Run the command."""
    try:
        from mmit.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(_interrupted())
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            _interrupted()
        raise


def _interrupted() -> int:
    print("interrupted", file=sys.stderr)  # noqa: T201
    return INTERRUPTED


if __name__ == "__main__":
    main()
