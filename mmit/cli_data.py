"""The ``mmit data`` verbs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mmit.data.construct.boxes import Convention

if TYPE_CHECKING:
    from mmit.data import Manifest

app = typer.Typer(help="Convert, check and look at data.", no_args_is_help=True)

Shards = Annotated[str, typer.Argument(metavar="SHARDS", help="A directory of shards, a tar, or a pattern of tars.")]


@app.command("convert")
def convert(
    source: Annotated[str, typer.Argument(help="Records (JSON, JSONL, CSV, TSV, a folder), or the name of a recipe.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Directory for the shards.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder that the records' image paths start from.")] = None,
    reader: Annotated[str, typer.Option(help="The form of the records (docs/recipes.md); auto looks.")] = "auto",
    prompt: Annotated[str, typer.Option(help="Question put before every caption (captions only).")] = "",
    max_bad: Annotated[float, typer.Option(min=0, max=1, help="Share of bad records that is tolerated.")] = 0.001,
    follow_links: Annotated[bool, typer.Option("--follow-links", help="Read pictures through links.")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every picture, not only its header.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes; else one per core.")] = None,
) -> None:
    """Turn records and pictures into shards; the same command continues a conversion that was stopped."""
    from mmit.data import load_recipe
    from mmit.data.convert import Conversion
    from mmit.data.convert import convert as run
    from mmit.data.sources.own import fitting_reader
    from mmit.errors import ConfigError

    if Path(source).exists() or out is not None:
        if out is None:
            raise ConfigError("--out is missing: say where the shards are to be written")
        conversion = Conversion(
            reader=fitting_reader(Path(source)) if reader == "auto" else reader,
            source=Path(source),
            target=out,
            name=out.name,
            images=images,
            prompt=prompt,
            verify="decode" if decode else "header",
            max_bad=max_bad,
            follow_links=follow_links,
        )
    else:
        conversion = load_recipe(source).conversion()
    _tell(conversion.target, run(conversion, processes=processes, overwrite=overwrite))


@app.command("show")
def show(
    shards: Shards,
    tokenizer: Annotated[str, typer.Option(help="A model: directory, name on the hub, or run file (YAML).")],
    template: Annotated[str, typer.Option(help="Chat template: own, a .jinja file, or a built-in name.")] = "own",
    style: Annotated[
        Literal["hf", "llava", "blip"] | None, typer.Option(help="How text around images is tokenized; else hf.")
    ] = None,
    image_tokens: Annotated[
        int | None, typer.Option(min=1, help="Image tokens of one picture; else 576. A model directory knows its own.")
    ] = None,
    sample: Annotated[list[int] | None, typer.Option(help="Number of a sample; may be repeated.")] = None,
) -> None:
    """Print samples as the model will see them: trained tokens in colour, runs of image tokens folded."""
    from rich.console import Console

    from mmit.data.show import show as shown
    from mmit.train.views import view_of

    console = Console(soft_wrap=True, highlight=False)
    view = view_of(tokenizer, template=template, style=style, image_tokens=image_tokens)
    for text in shown(shards, view, samples=sample or [0], marks=not console.is_terminal):
        console.print(text)


@app.command("check")
def check(
    target: Annotated[str, typer.Argument(metavar="SHARDS|RECIPE|RUN.yaml", help="What to check.")],
    decode: Annotated[bool, typer.Option(help="Decode every picture, not only its header.")] = True,
    tokenizer: Annotated[str, typer.Option(help="Whose control tokens must not be in a text (a run has one).")] = "",
    against: Annotated[list[str] | None, typer.Option(help="Shards that must not share a sample with these.")] = None,
    tokens_per_second: Annotated[float, typer.Option(min=0, help="What is trained, for the hours of a run.")] = 0.0,
    json: Annotated[Path | None, typer.Option("--json", help="Write the report as JSON.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write the report as a page with pictures.")] = None,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="List the samples with errors in quarantine.txt: training omits them.")
    ] = False,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes; else one per core.")] = None,
) -> None:
    """Read every byte and list what is wrong. Exit code: 1 for errors, 3 for warnings at worst, else 0."""
    from rich.console import Console

    from mmit.train.doctor import Depth, Questions, diagnose, save, tables

    depth = Depth(decode=decode, processes=processes) if processes else Depth(decode=decode)
    questions = Questions(
        depth=depth, against=tuple(against or ()), tokenizer=tokenizer, tokens_per_second=tokens_per_second
    )
    diagnosis = diagnose(target, questions)
    for shown in tables(diagnosis):
        Console().print(shown)
    for line in save(diagnosis, target, json=json, html=html, quarantined=quarantine):
        typer.echo(line)
    raise typer.Exit(diagnosis.exit_code)


@app.command("stats")
def stats(
    shards: Shards,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes; else one per core.")] = None,
) -> None:
    """Print what shards are made of: turns, words, pictures and their sizes."""
    from rich.console import Console

    from mmit.data.stats import stats as run

    Console().print(run(shards, processes=processes).table())


@app.command("browse")
def browse(
    shards: Shards,
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file.")],
    samples: Annotated[int, typer.Option(min=1, help="How many samples, drawn at random.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 0,
) -> None:
    """Write a page of samples with their pictures, to look through in a browser."""
    from mmit.data.browse import browse as run

    typer.echo(f"{out}: {run(shards, out, samples=samples, seed=seed)} samples")


@app.command("plan")
def plan(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The run file (YAML).")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[a.b=c]...")] = None,
    stage: Annotated[str | None, typer.Option(help="This stage only.")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks for the share of useful work.")] = 1,
) -> None:
    """Print what a run will read: samples, tokens, rows and steps, by source."""
    from rich.console import Console

    from mmit.config import load_config
    from mmit.train.feed import summaries
    from mmit.train.launch import check_stages

    config = load_config(file, overrides)
    console = Console(width=None if sys.stdout.isatty() else 132)
    for table in summaries(config, check_stages(config, stage), ranks=ranks):
        console.print(table)


@app.command("cache")
def cache(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The run file (YAML).")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[a.b=c]...")] = None,
    stage: Annotated[
        str | None, typer.Option(help="This stage only; else all that name a folder for features.")
    ] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Processes; else one per accelerator.")] = None,
) -> None:
    """Write what the frozen encoder makes of a stage's pictures; says first what it brings and takes."""
    import os

    from mmit.config import load_config
    from mmit.data.parallel import usable_cores
    from mmit.train.launch import check_stages
    from mmit.train.stage import prepare_process

    config = load_config(file, overrides)
    check_stages(config, stage)
    os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))
    prepare_process()
    from mmit.train.feature_cache import cache_features, stages_with_features

    for name in stages_with_features(config, stage):
        command = ["data", "cache", str(file), *(overrides or [])]
        cache_features(config, name, command, ranks=ranks, say=typer.echo)


@app.command("recipes")
def recipes() -> None:
    """List the recipes: published sets that `mmit data convert NAME` turns into shards."""
    from rich.console import Console

    from mmit.data.recipe import list_recipes, recipe_table

    Console().print(recipe_table(list_recipes()))


@app.command("construct")
def construct(
    annotations: Annotated[Path, typer.Argument(help="Annotated pictures (JSON or JSONL).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for the shards.")],
    pool: Annotated[str, typer.Option(help="Pool of wordings: a name in data_recipes/pools, or a file.")] = "general",
    images: Annotated[Path | None, typer.Option(help="Folder that the image paths start from.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Use this task only; may be repeated.")] = None,
    one_task: Annotated[bool, typer.Option("--one-task", help="One conversation per picture, of one task.")] = False,
    boxes: Annotated[Convention, typer.Option(help="How the annotations state their boxes.")] = "xyxy_px",
    seed: Annotated[int, typer.Option(help="Of the choice of wordings.")] = 0,
    max_bad: Annotated[float, typer.Option(min=0, max=1, help="Share of bad records that is tolerated.")] = 0.001,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes; else one per core.")] = None,
) -> None:
    """Make instruction data from annotations, through pools of wordings."""
    from mmit.data.construct.source import Construction
    from mmit.data.construct.source import construct as run

    construction = Construction(
        annotations=annotations,
        target=out,
        pool=pool,
        images=images,
        tasks=tuple(task or ()),
        one_task=one_task,
        boxes=boxes,
        seed=seed,
        max_bad=max_bad,
    )
    _tell(out, run(construction, processes=processes, overwrite=overwrite))


@app.command("generate")
def generate(
    file: Annotated[Path, typer.Argument(metavar="CONFIG", help="Endpoint, source and kinds (YAML).")],
    limit: Annotated[int | None, typer.Option(min=1, help="Ask about so many records only.")] = None,
    max_cost: Annotated[float | None, typer.Option(min=0, help="Stop before this cost is passed.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the journal and the records.")] = None,
) -> None:
    """Let a language model behind an OpenAI-compatible endpoint write instruction data; can be continued."""
    from mmit.data.generate.run import generate as run
    from mmit.data.generate.settings import load_generation

    given = {"limit": limit, "max_cost": max_cost, "out": out and str(out)}
    typer.echo(run(load_generation(file, {key: value for key, value in given.items() if value is not None})))


def _tell(target: Path, manifest: Manifest) -> None:
    totals = manifest.totals
    typer.echo(
        f"{target}: {totals['samples']} samples, {totals['images']} images, "
        f"{totals['text_only']} text-only, {len(manifest.shards)} shards, {len(manifest.bad)} bad records"
    )
    for reason, count in manifest.skipped.items():
        typer.echo(f"  skipped on purpose: {count} ({reason})")
    for sample in manifest.bad[:10]:
        typer.echo(f"  bad: {sample}")
