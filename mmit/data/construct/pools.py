"""Pools of wordings: a YAML file with several ways to ask for each task.

name: my_pool
boxes: xyxy01_padded          # how boxes are written, see ``boxes``
decimals: 3                   # of fractions
max_turns: 8                  # questions of one task about one picture, in one conversation
labels: [dog, cat, ...]       # only where every picture is annotated for all of them: a label without a box is absent
tasks:
  counting:
    kind: count               # a key of ``tasks.KINDS``
    wordings:
      - "How many instances of {label} are there?"
      - {ask: "Count: {label}", say: "There are {count}."}
"""

from __future__ import annotations

import difflib
import hashlib
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmit.data.construct.boxes import Convention
from mmit.data.construct.tasks import KINDS, Kind
from mmit.data.recipe import SHIPPED
from mmit.errors import ConfigError

FOLDER = Path("data_recipes") / "pools"
_SHIPPED = SHIPPED / "pools"
_NAME = re.compile(r"[a-z0-9_]+")


@dataclass(frozen=True)
class Wording:
    """One way to ask and to answer, with placeholders in braces."""

    ask: str
    say: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task of a pool: its kind and its wordings, whose numbers in samples' ``meta`` are positions in this list."""

    name: str
    kind: Kind
    wordings: tuple[Wording, ...]


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Wordings for tasks, and how boxes are written in them; ``digest`` is the hash of its file."""

    name: str
    tasks: Mapping[str, Task]
    boxes: Convention = "xyxy01_padded"
    decimals: int = 3
    max_turns: int = 8
    labels: tuple[str, ...] = ()
    digest: str = ""

    def only(self, names: tuple[str, ...]) -> Pool:
        """The pool with these tasks alone; all of them for (). Raises ConfigError."""
        for name in names:
            if name not in self.tasks:
                raise ConfigError(f"the pool {self.name} has no task '{name}'{_hint(name, self.tasks)}")
        kept = {name: task for name, task in self.tasks.items() if not names or name in names}
        return replace(self, tasks=kept)


def load_pool(name: str | Path) -> Pool:
    """The pool called ``name``, or in the file ``name``: as a path, in ./data_recipes/pools, or among those of mmit.

    Raises ConfigError naming the file and the key.
    """
    path = _find(Path(name).expanduser())
    try:
        text = path.read_bytes()
        content = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is no YAML: {' '.join(str(error).split())}") from None
    try:
        file = _File.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(step) for step in first["loc"]) or "the file"
        raise ConfigError(f"{path}: {where}: {first['msg']}") from None
    tasks = {key: _task(key, task, path) for key, task in file.tasks.items()}
    return Pool(
        name=file.name,
        tasks=tasks,
        boxes=file.boxes,
        decimals=file.decimals,
        max_turns=file.max_turns,
        labels=tuple(file.labels),
        digest=hashlib.sha256(text).hexdigest(),
    )


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _WordingFile(_Section):
    ask: str
    say: str = ""


class _TaskFile(_Section):
    kind: str
    wordings: Annotated[list[str | _WordingFile], Field(min_length=1)]


class _File(_Section):
    name: str
    about: str = ""
    boxes: Convention = "xyxy01_padded"
    decimals: Annotated[int, Field(ge=2, le=6)] = 3
    max_turns: Annotated[int, Field(ge=1)] = 8
    labels: list[str] = []
    tasks: Annotated[dict[str, _TaskFile], Field(min_length=1)]


def _task(name: str, task: _TaskFile, path: Path) -> Task:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{path}: the task '{name}' is not named by small letters, digits and _")
    if task.kind not in KINDS:
        raise ConfigError(f"{path}: tasks.{name}.kind: there is no '{task.kind}'{_hint(task.kind, KINDS)}")
    kind = KINDS[task.kind]
    wordings: list[Wording] = []
    for number, given in enumerate(task.wordings):
        ask, say = (given, "") if isinstance(given, str) else (given.ask, given.say)
        wording = Wording(ask=ask.strip(), say=say.strip() or kind.say)
        place = f"{path}: tasks.{name}.wordings[{number}]"
        _check(wording, kind, place)
        if wording in wordings:
            raise ConfigError(f"{place}: repeats wording {wordings.index(wording)}; each counts as one of its own")
        wordings.append(wording)
    return Task(name=name, kind=kind, wordings=tuple(wordings))


def _check(wording: Wording, kind: Kind, place: str) -> None:
    """Each placeholder is known, the question has what it needs, and the answer has something to say."""
    asked, said = (_placeholders(text, kind, place) for text in (wording.ask, wording.say))
    missing = sorted(kind.asks - asked)
    if missing:
        raise ConfigError(f"{place}: the question lacks {{{missing[0]}}}; without it nobody can answer")
    if not wording.ask or not said - kind.asks - {"box_form"}:
        raise ConfigError(f"{place}: {'the answer says nothing new' if wording.ask else 'the question is empty'}")
    given_away = sorted((asked - kind.asks - {"box_form"}) & said)
    if given_away:
        raise ConfigError(f"{place}: the question gives the answer away: {{{given_away[0]}}} is in both")


def _placeholders(text: str, kind: Kind, place: str) -> set[str]:
    try:
        pieces = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ConfigError(f"{place}: '{text}': {error}; a brace that is meant is written twice") from None
    found = {name for _, name, _, _ in pieces if name is not None}
    if any(spec or conversion for _, _, spec, conversion in pieces) or not found <= kind.names:
        strange = sorted(found - kind.names) or ["a format"]
        raise ConfigError(f"{place}: {strange[0]!r} is none of {', '.join(sorted(kind.names))}")
    return found


def _find(given: Path) -> Path:
    folders = [FOLDER, _SHIPPED]
    for path in [given, *(folder / given for folder in folders)]:
        for candidate in (path, path.with_name(path.name + ".yaml")):
            if candidate.is_file():
                return candidate
    known = {path.stem: path for folder in folders for path in folder.glob("*.yaml")}
    raise ConfigError(f"there is no pool '{given}' as a file or in {FOLDER}{_hint(given.stem, known)}")


def _hint(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(known)}"
