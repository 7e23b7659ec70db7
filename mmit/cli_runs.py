"""The verbs around a run: ``mmit new`` and ``mmit plan`` before it, ``mmit report`` and ``mmit diff`` after it."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from mmit.errors import ConfigError


def new(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The run file to write; must not exist.")],
    model: Annotated[str, typer.Option(help="The model to tune: a directory, or a name on the hub.")],
    data: Annotated[str, typer.Option(help="Shards to train on, made by `mmit data convert`.")],
    held_out: Annotated[str, typer.Option(help="Shards to measure on; else a part of --data is kept apart.")] = "",
) -> None:
    """Write a run file that tunes a model on your data with LoRA, with numbers that fit its size."""
    from mmit.train.new_run import Sets, write_new_run

    for line in write_new_run(file, model, Sets(data=data, held_out=held_out)):
        typer.echo(line)


def plan(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The run file (YAML).")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[a.b=c]...", help="Changes to it.")] = None,
    stage: Annotated[str | None, typer.Option(help="This stage only.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Devices, one rank on each; else those here.")] = None,
    memory: Annotated[float | None, typer.Option(help="GiB of a device; else that of those here.")] = None,
    rate: Annotated[float | None, typer.Option(help="TFLOP/s of a device; else measured here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: bytes, tokens, seconds.")] = False,
) -> None:
    """Predict peak memory per rank under each ZeRO stage, what fits, and steps and time per epoch; needs no GPU."""
    import json

    from mmit.config import load_config
    from mmit.train.launch import check_stages
    from mmit.train.stage import prepare_process

    prepare_process()
    from mmit.train.plan_advice import advice
    from mmit.train.plan_table import as_json as described
    from mmit.train.plan_table import plan_lines, plan_table
    from mmit.train.planner import Machine, plan_run

    for option, given in (("--memory", memory), ("--rate", rate)):
        if given is not None and not 0 < given < math.inf:
            raise ConfigError(f"{option} {given:g}: is no size of a device; give a number above 0, or leave it out")
    config = load_config(file, overrides)
    stages = check_stages(config, stage)
    machine = Machine.given(ranks=gpus, gib=memory, rate=rate)
    plans = plan_run(config, stages, machine)
    if as_json:
        typer.echo(json.dumps([described(one) for one in plans], indent=1))
        return
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    for one in plans:
        console.print(plan_table(one, width=console.width))
        for line in plan_lines(one):
            console.print(line, markup=False)
        if machine.memory:
            found = advice(one)
            console.print(found.sentence, markup=False, style="bold")
            if found.overrides:
                # one line however long it is, to be pasted
                console.print(f"  mmit train {file} {shlex.join(found.overrides)}", markup=False, soft_wrap=True)
        console.print()


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
    """Tell what differed between two runs: settings, data, versions, git, ranks, results, answers and timings."""
    import json
    from dataclasses import asdict

    from mmit.train.difference import difference_table, differences

    found = differences(first, second)
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found], indent=1, default=str))
    elif not found:
        typer.echo(f"{first} and {second}: no difference in what is known of both")
    else:
        from rich.console import Console

        Console(soft_wrap=True).print(difference_table(found, first, second), markup=False)
