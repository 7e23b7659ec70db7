"""Keys of DeepSpeed's dictionary that nobody reads: DeepSpeed would pass over them in silence.

Which keys it knows is asked of DeepSpeed itself: its configuration is made from dictionaries that note what is read.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from pydantic import ValidationError

from mmit.errors import ConfigError

READ_AS_A_WHOLE = ("zero_optimization",)
"""Sections that DeepSpeed checks itself although it also reads some of their keys one by one."""


class _Noting(dict[str, Any]):
    """A dictionary that notes which keys were asked for, in its sections too."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__({key: _Noting(value) if isinstance(value, dict) else value for key, value in content.items()})
        self.asked: set[str] = set()

    def get(self, key: object, default: Any = None, /) -> Any:  # noqa: ANN401 - dict's own
        self.asked.add(str(key))
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:  # noqa: ANN401 - dict's own
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __deepcopy__(self, memo: dict[int, object]) -> _Noting:
        return self  # DeepSpeed reads a copy; what is noted is wanted here


def check_keys(config: dict[str, Any], extra: dict[str, Any]) -> None:
    """Raise ConfigError for a key or value of ``extra``, merged into ``config``, that DeepSpeed refuses or ignores."""
    noting = _Noting(config)
    try:
        DeepSpeedConfig(noting)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        path = next((path for path in _paths(extra) if path.endswith(key)), key)
        if first["type"] == "extra_forbidden":
            raise _unknown(path, _fields(error.title)) from None
        raise ConfigError(f"zero.extra: DeepSpeed refuses '{path}': {first['msg']}") from None
    except DeepSpeedConfigError as error:
        raise ConfigError(f"zero.extra: DeepSpeed refuses it: {error}") from None
    for path in _paths(extra):
        *sections, key = path.split(".")
        section = noting
        for name in sections:
            section = section[name]
        is_read_by_key = bool(section.asked) and not set(sections) & set(READ_AS_A_WHOLE)
        if is_read_by_key and key not in section.asked:
            raise _unknown(path, section.asked)


def _paths(section: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in section.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{key}.")


def _fields(model: str) -> set[str]:
    known = {kind.__name__: set(kind.model_fields) for kind in DeepSpeedConfigModel.__subclasses__()}
    return known.get(model, set())


def _unknown(path: str, known: set[str]) -> ConfigError:
    *sections, key = path.split(".")
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.5)
    hint = f"; did you mean '{'.'.join([*sections, near[0]])}'?" if near else ""
    return ConfigError(f"zero.extra: DeepSpeed has no key '{path}'{hint}")
