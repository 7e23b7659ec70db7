"""``python -m mmit`` is the ``mmit`` command."""

from mmit.cli import main

if __name__ == "__main__":
    main()
