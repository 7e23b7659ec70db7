"""The verbs about machines: ``mmit doctor`` and ``mmit launch``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mmit.errors import ConfigError


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for a bug report.")] = False,
    cache: Annotated[Path, typer.Option(help="Folder whose disk is looked at too.")] = Path("~/.cache/mmit"),
) -> None:
    """Tell versions, devices, attention kernels, backends, disk and threads of this machine, with advice."""
    import json

    from mmit.train.environment import look

    found = look(cache=cache)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for section, content in found.to_dict().items():
        if section == "advice":
            continue
        rows = content if isinstance(content, dict) else dict(enumerate(content)) or {"": "none"}
        for number, (name, value) in enumerate(rows.items()):
            shown = f"{value:.1f}" if isinstance(value, float) else str(value)
            table.add_row("" if number else section, str(name), shown)
    console = Console()
    console.print(table, markup=False)
    console.print()
    for sentence in found.advice:
        console.print(f"- {sentence}", markup=False, soft_wrap=True, highlight=False)


def launch(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The run file (YAML).")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[a.b=c]...", help="Changes to it.")] = None,
    slurm: Annotated[Path | None, typer.Option(help="Write a batch script for SLURM here; '-' prints it.")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    ranks_per_node: Annotated[int, typer.Option(min=1, help="Ranks on each machine, one for each device.")] = 8,
    cpus_per_rank: Annotated[int, typer.Option(min=1, help="CPU cores for each rank.")] = 8,
    time: Annotated[str, typer.Option(help="Longest time, as SLURM writes it.")] = "24:00:00",
    cpu: Annotated[bool, typer.Option("--cpu", help="Ask for no devices: CPU ranks.")] = False,
    option: Annotated[list[str] | None, typer.Option(help="Of sbatch, such as --partition=gpu; repeats.")] = None,
) -> None:
    """Write how to start a run elsewhere: a batch script for SLURM."""
    from mmit.config import load_config
    from mmit.train.slurm import Cluster, batch_script

    if slurm is None:
        raise ConfigError("say where the script goes: --slurm FILE, or --slurm - to print it")
    cluster = Cluster(
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        time=time,
        cpus_per_rank=cpus_per_rank,
        devices=not cpu,
        options=option or [],
    )
    script = batch_script(load_config(file, overrides), file, overrides or [], cluster)
    if str(slurm) == "-":
        sys.stdout.write(script)
        return
    try:
        slurm.write_text(script, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{slurm}: cannot be written: {error.strerror}") from None
    typer.echo(f"wrote {slurm}; submit it with: sbatch {slurm}")
