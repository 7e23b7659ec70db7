"""The verbs about what was trained: ``mmit report`` and ``mmit diff``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, or of one of its stages.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The page to write; else report.html in RUN.")] = None,
) -> None:
    """Write one HTML page about a run: settings, data, curves, held-out results, timings, checkpoints."""
    from mmit.train.report import write_report

    typer.echo(f"wrote {write_report(folder, out or folder / 'report.html')}")


def diff(
    first: Annotated[Path, typer.Argument(metavar="RUN_A", help="The folder of a run, a stage, or a model.")],
    second: Annotated[Path, typer.Argument(metavar="RUN_B", help="Another one.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell what differed between two runs: settings, data, versions, git, ranks, results and timings."""
    import json
    from dataclasses import asdict

    from mmit.train.difference import difference_table, differences

    found = differences(first, second)
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found], indent=1, default=str))
    elif not found:
        typer.echo(f"{first} and {second}: no difference")
    else:
        from rich.console import Console

        Console(soft_wrap=True).print(difference_table(found, first, second), markup=False)
