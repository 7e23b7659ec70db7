"""The command line's verbs on model directories: ``mmit export`` and ``mmit inspect``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mmit.config import WholeModel

ModelDirectory = Annotated[
    Path, typer.Argument(metavar="DIR", help="A model directory, a run's stage folder, or a name on the hub.")
]
Base = Annotated[str | None, typer.Option(help="Language model of a checkpoint that holds a projector or LoRA only.")]
Tower = Annotated[str | None, typer.Option(help="Vision tower in the place of the one that a checkpoint names.")]
Template = Annotated[str, typer.Option(help="Chat template: own, a .jinja file, or a built-in name.")]


def whole_model(directory: Path, base: str | None, tower: str | None, template: str) -> WholeModel:
    """The model that these options name, as a section of a run file."""
    from mmit.config import WholeModel

    return WholeModel(path=str(directory), base=base, tower=tower, template=template)


class To(StrEnum):
    """Formats on the command line."""

    HF = "hf"
    LLAVA = "llava"
    MMIT = "mmit"


def export(
    directory: ModelDirectory,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write; must not exist.")],
    to: Annotated[To, typer.Option(help="transformers' class, LLaVA's original code, or mmit's own layout.")] = To.HF,
    llm_only: Annotated[bool, typer.Option("--llm-only", help="The tuned language model alone.")] = False,
    dtype: Annotated[str, typer.Option(help="auto (as it is stored), fp32, bf16 or fp16.")] = "auto",
    base: Base = None,
    tower: Tower = None,
    template: Template = "own",
) -> None:
    """Write a model in another format, and prove that it is the same model there."""
    from mmit.distributed import set_up_logging
    from mmit.export.export import export as run

    set_up_logging()
    model = whole_model(directory, base, tower, template)
    for line in run(model, out, to=to.value, llm_only=llm_only, dtype=dtype):
        typer.echo(line)


def inspect(
    path: Annotated[Path, typer.Argument(metavar="DIR|FILE", help="Any checkpoint, model directory or weight file.")],
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """Tell what a checkpoint holds, without loading it. Exit code: 1 where there are problems, else 0."""
    import json

    from mmit.models.inspection import inspect as look

    found = look(path)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
        raise typer.Exit(1 if found.problems else 0)
    typer.echo(f"{found.path}: {found.kind}")
    for part in found.parts:
        size = f"{part.parameters:>16,} parameters {part.bytes / 1e9:>9.3f} GB"
        typer.echo(f"  {part.name:<15}{size}  {part.tensors:>5} tensors  {', '.join(part.dtypes)}")
    for name, value in found.facts.items():
        typer.echo(f"  {name}: {json.dumps(value) if isinstance(value, dict | list) else value}")
    for problem in found.problems:
        typer.echo(f"  PROBLEM {problem}")
    raise typer.Exit(1 if found.problems else 0)
