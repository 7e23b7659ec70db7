"""From a YAML file and overrides to a RunConfig, with every mistake named at once."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
import yaml.constructor
from pydantic import BaseModel, Tag, ValidationError
from pydantic_core import ErrorDetails

from mmit.config.run import RunConfig
from mmit.errors import ConfigError


def read(path: Path, overrides: list[str]) -> RunConfig:
    """The checked content of ``path``. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; a run file is a YAML such as those in configs/") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; a run file is a YAML such as those in configs/") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is no text in UTF-8; a run file is a YAML such as those in configs/") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    return parse(text, source=str(path), overrides=overrides).read_from(path)


def parse(text: str, *, source: str, overrides: list[str]) -> RunConfig:
    """The checked content of a YAML text; ``source`` names it in messages. Raises ConfigError."""
    try:
        content = yaml.load(text, Loader=_UniqueKeys)  # noqa: S506  (a SafeLoader that refuses repeated keys)
    except (ValueError, RecursionError) as error:  # a date such as 2020-13-45, a number of 5000 digits, a deep nest
        raise ConfigError(f"{source}: is not YAML that can be read: {' '.join(str(error).split())[:120]}") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        place = f" line {where.line + 1} column {where.column + 1}" if where else ""
        raise ConfigError(f"{source}:{place} is not YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(content, dict):
        found = "and this one is empty" if content is None else f"not a bare {type(content).__name__}"
        raise ConfigError(f"{source}: a run file holds keys such as name, model and stages, {found}")
    for override in overrides:
        _apply(content, override)
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        lines = _sentences(error.errors())
        many = f"{len(lines)} mistakes" if len(lines) > 1 else "one mistake"
        raise ConfigError(f"{source}: {many}\n" + "\n".join(f"  {line}" for line in lines)) from None


def resolved_yaml(config: RunConfig) -> str:
    """The whole config with every default written out, as YAML that can be run again."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_none=True), sort_keys=False, width=110)


def json_schema() -> dict[str, Any]:
    """JSON schema of a run file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}


class _UniqueKeys(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | None):
                place = key_node.start_mark
                raise yaml.constructor.ConstructorError(None, None, "a key is a word, not a list or mapping", place)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 2e-5 and 1e5 as strings; people who write them mean numbers.
_UniqueKeys.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+0123456789.")
)


def _apply(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override '{override}' is not of the form a.b=value")
    here: Any = content  # each step copies what it changes: a YAML alias repeats the same object elsewhere
    *parents, last = key.split(".")
    for depth, name in enumerate(parents):
        here = _step_into(here, name, ".".join(parents[: depth + 1]))
    try:
        parsed = yaml.load(value, Loader=_UniqueKeys)  # noqa: S506
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"override '{override}': the value is not YAML") from None
    if isinstance(here, list):
        here[_position(here, last, key)] = parsed
    else:
        here[last] = parsed


def _step_into(here: Any, name: str, path: str) -> Any:  # noqa: ANN401  (a YAML tree)
    key: Any = _position(here, name, path) if isinstance(here, list) else name
    below = here[key] if isinstance(here, list) else here.get(key, {})
    if not isinstance(below, dict | list):
        raise ConfigError(f"override: '{path}' holds the value {below!r} and has no keys below it")
    here[key] = below.copy()
    return here[key]


def _position(here: list[Any], name: str, path: str) -> int:
    if not name.isdecimal() or int(name) >= len(here):
        raise ConfigError(f"override: '{path}' needs a number below {len(here)}, the entries of that list")
    return int(name)


def _sentences(mistakes: Sequence[ErrorDetails]) -> list[str]:
    """One for each key; what each kind of value that a key takes objects to (``3`` or ``auto``) is told together."""
    by_path: dict[str, list[str]] = {}
    for details in mistakes:
        told = by_path.setdefault(".".join(map(str, _without_tags(details["loc"]))), [])
        message = _message(details)
        told.append(message.removeprefix("input should be ") if told else message)
    given = {".".join(map(str, _without_tags(details["loc"]))): _given(details) for details in mistakes}
    return [(f"{path}: " if path else "") + ", or ".join(told) + given[path] for path, told in by_path.items()]


def _message(details: ErrorDetails) -> str:
    message = details["msg"].removeprefix("Value error, ")
    match details["type"]:
        case "extra_forbidden":
            key = str(details["loc"][-1])
            near = difflib.get_close_matches(key, sorted(_keys_at(details["loc"][:-1])), n=1, cutoff=0.6)
            return "unknown key" + (f" - did you mean '{near[0]}'?" if near else "")
        case "missing":
            return "missing"
        case "unknown_type" | "value_error":
            return message
        case "dict_type" | "model_type":
            return "keys and values belong below it"
        case _:
            return f"{message[:1].lower()}{message[1:]}"


def _given(details: ErrorDetails) -> str:
    told = details["type"] in ("extra_forbidden", "missing", "unknown_type", "value_error")
    return "" if told or isinstance(details.get("input"), dict | list) else f" (given: {details['input']!r})"


def _without_tags(location: tuple[int | str, ...]) -> list[int | str]:
    """The path as the user wrote it: without the names that pydantic gives to the branches of a union."""
    path, annotation = [], RunConfig
    for part in location:
        branches = _branches(annotation)
        if part in branches:
            annotation = branches[part]
            continue
        if _is_plain_union(annotation):  # pydantic names the kind of value that it tried
            annotation = None
            continue
        path.append(part)
        annotation = _below(annotation, part)
    return path


def _keys_at(location: tuple[int | str, ...]) -> set[str]:
    annotation: Any = RunConfig
    for part in location:
        branches = _branches(annotation)
        annotation = branches[part] if part in branches else _below(annotation, part)
    return set(annotation.model_fields) if isinstance(annotation, type) and issubclass(annotation, BaseModel) else set()


def _branches(annotation: Any) -> dict[int | str, Any]:  # noqa: ANN401  (a type expression)
    """Tag -> model of a tagged union, else nothing."""
    if get_origin(annotation) is Annotated:
        return _branches(get_args(annotation)[0])
    if get_origin(annotation) not in (Union, types.UnionType):
        return {}
    return {
        item.tag: get_args(member)[0]
        for member in get_args(annotation)
        if get_origin(member) is Annotated
        for item in get_args(member)[1:]
        if isinstance(item, Tag)
    }


def _is_plain_union(annotation: Any) -> bool:  # noqa: ANN401  (a type expression)
    """Whether several kinds of values are taken, such as a number or a word."""
    if get_origin(annotation) is Annotated:
        return _is_plain_union(get_args(annotation)[0])
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    return get_origin(annotation) in (Union, types.UnionType) and len(kinds) > 1


def _below(annotation: Any, part: int | str) -> Any:  # noqa: ANN401  (a type expression)
    if get_origin(annotation) is Annotated:
        return _below(get_args(annotation)[0], part)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel) and isinstance(part, str):
        field = annotation.model_fields.get(part)
        return field.annotation if field else None
    if get_origin(annotation) in (dict, list):
        return get_args(annotation)[-1]
    if get_origin(annotation) is tuple:
        return get_args(annotation)[0]
    return None
