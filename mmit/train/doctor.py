"""What is wrong with the data of a set, a recipe or a run, and what a run would make of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from json import dumps
from pathlib import Path

import numpy as np
import yaml
from rich.markup import escape
from rich.table import Table

from mmit.config import Batching, RunConfig, load_config
from mmit.data import ShardSet, load_recipe, measure_lengths, quarantine
from mmit.data.browse import save_page
from mmit.data.check import Depth, check
from mmit.data.control import ControlledSet
from mmit.data.examine import Control
from mmit.data.findings import Diagnosis, Prediction, Report
from mmit.data.page import diagnosis_page
from mmit.data.plan import Plan
from mmit.data.recipe import find_recipe
from mmit.data.remote import is_remote
from mmit.data.summary import summarize
from mmit.errors import ConfigError, DataError, MmitError
from mmit.models import read_outline
from mmit.tokenizer import control_tokens, load_tokenizer
from mmit.train.feed import Encode, location, make_encode, plan_stage


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What is to be found out. against: sets that must not share a sample with the checked ones.

    tokenizer: whose control tokens must not stand in a text; empty asks for the common ones, a run brings its own.
    tokens_per_second: what the machine trains, for the hours; 0 leaves them out.
    """

    depth: Depth = Depth()
    against: tuple[str, ...] = ()
    tokenizer: str = ""
    tokens_per_second: float = 0.0


def diagnose(target: str, questions: Questions) -> Diagnosis:
    """Check shards (directory, tar, pattern, URL), the shards of a recipe, or all that a run file reads.

    Raises DataError and ConfigError where there is nothing to check.
    """
    if _is_run(target):
        return _diagnose_run(load_config(target), questions)
    depth = questions.depth
    if questions.tokenizer:
        control = Control(control_tokens(load_tokenizer(questions.tokenizer)), "error")
        depth = replace(depth, control=control)
    return Diagnosis([check(_shards(target), depth, against=questions.against)])


def tables(diagnosis: Diagnosis) -> Iterator[Table | str]:
    """The report for rich to print."""
    for report in diagnosis.reports:
        yield report.table() if report.faults else f"{escape(report.headline())}, no faults"
    for prediction in diagnosis.predictions:
        yield escape(prediction.summary()) if prediction.problem else prediction.table()


def save(diagnosis: Diagnosis, title: str, *, json: Path | None, html: Path | None, quarantined: bool) -> Iterator[str]:
    """Write what is asked for: the report as JSON, as a page, ``quarantine.txt`` beside the shards; a line for each.

    Raises DataError where a file cannot be written, and where shards from a URL have errors: the list belongs there.
    """
    if json is not None:
        save_page(json, dumps(diagnosis.to_json(), indent=1, ensure_ascii=False) + "\n")
        yield f"{json}: the report"
    if html is not None:
        save_page(html, diagnosis_page(title, diagnosis))
        yield f"{html}: the report"
    for report in diagnosis.reports if quarantined else ():
        if not report.broken:
            continue
        if report.url:
            raise DataError(
                f"{report.url}: quarantine.txt belongs beside the manifest; check a local copy and upload the list"
            )
        path = quarantine.write(next(iter(report.tars.values())).parent, report.broken)
        yield f"{path}: {len({(entry.shard, entry.row) for entry in report.broken})} samples added"


def _is_run(target: str) -> bool:
    path = Path(target).expanduser()
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return False
    try:
        content = yaml.safe_load(path.read_bytes())
    except yaml.YAMLError:
        return True  # whoever reads it next says what is wrong with it
    return isinstance(content, dict) and "stages" in content


def _shards(target: str) -> str | Path:
    path = Path(target.removeprefix("file://")).expanduser()
    is_file_of_words = path.suffix in (".yaml", ".yml")
    if is_remote(target) or "*" in target or (path.exists() and not is_file_of_words):
        return target
    if not is_file_of_words and len(path.parts) > 1:
        raise DataError(f"{target}: there is no such directory or tar")
    try:
        recipe = find_recipe(target)
    except ConfigError as error:
        raise ConfigError(f"{target}: there is no directory, tar or run file of this name, and {error}") from None
    return load_recipe(str(recipe)).directory


def _diagnose_run(config: RunConfig, questions: Questions) -> Diagnosis:
    outline = read_outline(config.model)
    control = Control(control_tokens(outline.tokenizer), "error")
    reports: dict[str, Report] = {}
    predictions = []
    for name, stage in config.stages.items():
        depth = replace(
            questions.depth,
            control=control,
            cache=Path(stage.data.cache),
            cache_bytes=round(stage.data.cache_gb * 1e9),
        )
        for source in stage.data.mix:
            where = location(source, beside=config.file)
            if str(where) not in reports:
                reports[str(where)] = check(where, depth, against=questions.against)
        encode = make_encode(stage.data, outline)
        try:
            plan = plan_stage(config, stage, encode)
        except MmitError as error:
            predictions.append(Prediction(stage=name, problem=str(error)))
        else:
            predictions.append(predict(name, plan, encode, stage.batch, tokens_per_second=questions.tokens_per_second))
    return Diagnosis(list(reports.values()), predictions)


def predict(stage: str, plan: Plan, encode: Encode, batch: Batching, *, tokens_per_second: float) -> Prediction:
    """What a plan amounts to; the lengths are those before anything was cut."""
    raw, dropped, cut, refused = [], 0, 0, 0
    for source, fitted in zip(plan.sources, plan.tables, strict=True):
        assert isinstance(source, ShardSet | ControlledSet), "plans of stages read shards"
        table = measure_lengths(source, encode.measure, fingerprint=encode.fingerprint(), max_skipped=1, progress=False)
        raw.append(table.tokens[table.tokens > 0])
        dropped += int(((table.tokens > 0) & (fitted.tokens == 0)).sum())
        cut += int(((fitted.tokens > 0) & (fitted.tokens < table.tokens)).sum())
        refused += len(table.refused)
    tokens = np.concatenate(raw)
    bits, counts = np.unique(np.frexp(tokens.astype(np.float64))[1], return_counts=True)
    summary = summarize(plan, length=batch.length, rows_per_micro_batch=batch.rows_per_micro_batch)
    total = sum(share.tokens for share in summary.sources)
    return Prediction(
        stage=stage,
        lengths=dict(zip(bits.tolist(), counts.tolist(), strict=True)),
        longest=int(tokens.max(initial=0)),
        samples=plan.samples,
        dropped=dropped,
        cut=cut,
        refused=refused,
        rows=summary.rows,
        padding=1 - summary.useful,
        steps=summary.steps,
        tokens=total,
        hours=total / tokens_per_second / 3600 if tokens_per_second else 0.0,
    )
