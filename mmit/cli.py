"""The ``mmit`` command: each verb parses its words and calls one function.

Nothing heavy is imported before a verb is known, so that help and checks answer at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from mmit import __version__, cli_data, cli_machine, cli_models, cli_runs
from mmit.cli_models import Base, ModelDirectory, Template, Tower, whole_model
from mmit.errors import ConfigError, MmitError, OtherRankFailed
from mmit.train.lifeline import end_with_launcher, note_error

app = typer.Typer(
    help="Compose a vision-language model, teach it in stages, and know that it is right.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(help="Look at run files.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(cli_data.app, name="data")
app.command("export")(cli_models.export)
app.command("doctor")(cli_machine.doctor)
app.command("launch")(cli_machine.launch)
app.command("inspect")(cli_models.inspect)
app.command("new")(cli_runs.new)
app.command("plan")(cli_runs.plan)
app.command("report")(cli_runs.report)
app.command("diff")(cli_runs.diff)

RunFile = Annotated[Path, typer.Argument(metavar="FILE", help="The run file (YAML).")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[a.b=c]...", help="Changes to the run file.")]


def main() -> None:
    """Run the command; a user's mistake ends as one sentence and its exit code, never as a traceback."""
    if "RANK" in os.environ:
        end_with_launcher()
    try:
        app()
    except MmitError as error:
        if isinstance(error, OtherRankFailed):
            sys.exit(error.exit_code)
        if not note_error(str(error)):
            print(f"error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)


@app.callback(invoke_without_command=True)
def _before_any_verb(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0,
) -> None:
    del local_rank  # DeepSpeed's launcher puts it in front of the verb; the environment says the same
    if version:
        typer.echo(f"mmit {__version__}")
        raise typer.Exit


@app.command()
def train(
    file: RunFile,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="Train this stage only.")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Processes to start; else one per device.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start again: removes what the stage has so far.")] = False,
) -> None:
    """Train the stages of a run file in order; the same command continues an interrupted run."""
    from mmit.config import load_config
    from mmit.distributed import is_launched, set_up_logging
    from mmit.train.launch import check_stages, run_stages

    config = load_config(file, overrides)
    stages = check_stages(config, stage)
    if is_launched():
        from mmit.train.stage import train_stage

        if len(stages) > 1:
            raise ConfigError(f"a launcher trains one stage: add --stage, one of {', '.join(stages)}")
        train_stage(config, stages[0], fresh=fresh)
        return
    set_up_logging()
    command = ["train", str(file), *(overrides or [])]
    run_stages(config, command, stages=stages, ranks=ranks, fresh=fresh)


@app.command()
def check(file: RunFile, overrides: Overrides = None) -> None:
    """Check a run file against the parts it names, without reading weights or data (`mmit data check` reads those)."""
    from mmit.config import load_config
    from mmit.train.run_check import check_run, refuse_mistakes

    report = check_run(load_config(file, overrides))
    refuse_mistakes(report, file)
    for line in report.lines():
        typer.echo(line)


@config_app.command("show")
def config_show(file: RunFile, overrides: Overrides = None) -> None:
    """Print the run file as it is understood, with every default."""
    from mmit.config import load_config
    from mmit.config_file import resolved_yaml

    typer.echo(resolved_yaml(load_config(file, overrides)), nl=False)


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of a run file, for editors."""
    import json

    from mmit.config_file import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@app.command()
def merge(
    directory: ModelDirectory,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write.")],
) -> None:
    """Add an adapter (LoRA) to the weights it was trained beside: a plain model with the same answers."""
    from mmit.distributed import set_up_logging
    from mmit.models import merge_directory

    set_up_logging()
    typer.echo(f"merged into {merge_directory(directory, out)}")


@app.command()
def chat(
    directory: ModelDirectory,
    image: Annotated[list[Path] | None, typer.Option(help="A picture; may be repeated.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Ask this, print the answer and end; '-' reads it.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Share of probability that is drawn from.")] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Of the drawing, to repeat it.")] = None,
    base: Base = None,
    tower: Tower = None,
    template: Template = "own",
) -> None:
    """Talk to a model about pictures."""
    from mmit.chat.terminal import Style, run_chat

    style = Style(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    run_chat(whole_model(directory, base, tower, template), image or [], prompt, style=style)


@app.command()
def serve(
    directory: ModelDirectory,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    base: Base = None,
    tower: Tower = None,
    template: Template = "own",
) -> None:
    """Serve a model: a chat page, and an API that OpenAI's clients speak (needs the extra 'serve')."""
    from mmit.chat.server import serve as run

    run(whole_model(directory, base, tower, template), host=host, port=port)


@app.command("eval")
def evaluate(
    directory: ModelDirectory,
    data: Annotated[str, typer.Option(help="Held-out shards; the first question of each sample is asked.")],
    pictures: Annotated[list[str] | None, typer.Option(help="true, blank or other; may be repeated.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask the first so many samples only.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 16,
    out: Annotated[Path | None, typer.Option(help="Also write scores and every answer as JSON.")] = None,
    base: Base = None,
    tower: Tower = None,
    template: Template = "own",
) -> None:
    """Score a model by exact match, by question type, with the true picture and without it."""
    from rich.console import Console

    from mmit.evaluate.runner import evaluate as run

    model = whole_model(directory, base, tower, template)
    scores = run(model, data, pictures=pictures or ["true"], limit=limit, max_new_tokens=max_new_tokens)
    Console().print(scores.table(f"exact match on {data}"))
    if out is not None:
        scores.write(out)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that is made.")] = Path("demo_run"),
    size: Annotated[str, typer.Option(help="full, or test for a small one.")] = "full",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings with and without alignment.")] = 1,
) -> None:
    """Make a world, an encoder and a language model, train two stages, and measure what was learned; offline."""
    from mmit.demo.story import run_demo

    run_demo(out, size=size, seeds=seeds)
