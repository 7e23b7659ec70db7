"""The file that says what is generated: from which annotations, by which endpoint, within which limits.

endpoint:
  base_url: http://127.0.0.1:8000/v1     # any server that speaks OpenAI's chat completion protocol
  model: my-model
  api_key_env: MY_KEY                    # the environment variable that holds the key, where one is needed
source: annotations.jsonl                # the form of ``mmit data construct``
images: pictures/
out: data/generated/my_set
kinds: [conversation, description, reasoning]
see: text                                # text (captions and boxes), image, or both
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator

from mmit.data.construct.boxes import Convention
from mmit.data.generate.prompts import Kind, See
from mmit.errors import ConfigError

_OURS = ("model", "messages", "stream", "max_tokens", "temperature")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Endpoint(_Section):
    """Where the language model is, and how it is asked."""

    base_url: str
    """Address up to and without ``/chat/completions``."""
    model: str
    api_key_env: str = ""
    """Name of the environment variable with the key; it is sent as a bearer token and written nowhere."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.7
    max_tokens: PositiveInt = 1024
    """Longest answer, in tokens; one that is cut off there is rejected."""
    body: dict[str, Any] = {}
    """Further fields of the request, such as ``top_p``."""
    timeout: Annotated[float, Field(gt=0)] = 120.0
    """Seconds for one request, from connecting to the last byte."""
    tries: PositiveInt = 6
    """Of one request that the network or the server fails."""
    first_wait: Annotated[float, Field(gt=0)] = 1.0
    """Seconds before the second try; each further one doubles it, up to a minute. ``Retry-After`` is heeded."""
    concurrency: PositiveInt = 8
    """Requests at a time."""

    @field_validator("base_url")
    @classmethod
    def _is_address(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("not an address such as http://127.0.0.1:8000/v1")
        if parts.username or parts.password or parts.query:
            raise ValueError("a key does not belong into the address; name its variable in api_key_env")
        return url.rstrip("/").removesuffix("/chat/completions")

    @field_validator("body")
    @classmethod
    def _leaves_ours(cls, body: dict[str, Any]) -> dict[str, Any]:
        for name in _OURS:
            if name in body:
                raise ValueError(f"'{name}' is not set here")
        return body


class Price(_Section):
    """What a million tokens costs, in any currency."""

    prompt: Annotated[float, Field(ge=0)]
    completion: Annotated[float, Field(ge=0)]

    def of(self, prompt_tokens: float, completion_tokens: float) -> float:
        """The cost of that many tokens."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


class Generation(_Section):
    """What to generate."""

    endpoint: Endpoint
    source: Path
    """Annotations: a JSON list or JSONL."""
    out: Path
    """Folder for the journal and the records."""
    images: Path | None = None
    """Folder that the annotations' paths start from; else that of the source."""
    kinds: Annotated[list[Kind], Field(min_length=1)] = ["conversation", "description", "reasoning"]
    """What is written about each picture."""
    see: See = "text"
    """What the model is shown: the annotation in words, the picture, or both."""
    boxes: Convention = "xyxy_px"
    """The convention of the annotations' boxes."""
    prompts: Path | None = None
    """A file of one's own prompts; else those of mmit."""
    reask: Annotated[int, Field(ge=0)] = 2
    """How often a question is asked again whose answer was rejected."""
    limit: Annotated[int, Field(ge=0)] = 0
    """The first so many annotations only; 0 takes all."""
    price: Price | None = None
    max_cost: Annotated[float, Field(ge=0)] = 0.0
    """Nothing is asked that could make the whole folder cost more; 0 sets no bound."""
    max_side: PositiveInt = 1024
    """Pixels of a picture's longer side; a larger one is made smaller before it is sent."""
    max_bad: Annotated[float, Field(ge=0, le=1)] = 0.001
    """Share of annotations that may be unusable."""
    seed: int = 0
    """Of the wording of what the user asks for a description."""

    @model_validator(mode="after")
    def _cost_needs_a_price(self) -> Self:
        if self.max_cost and (self.price is None or not self.price.of(1, 1)):
            raise ValueError("max_cost needs the price of a million tokens: price: {prompt: ..., completion: ...}")
        return self


def load_generation(path: Path, changes: Mapping[str, Any] | None = None) -> Generation:
    """The settings in a YAML file, with ``changes`` to its top level such as ``{"limit": 10}``.

    Paths start from the working directory. Raises ConfigError naming the file and the first key that is wrong.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        remedy = "name a YAML file with keys such as endpoint, source and out"
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; {remedy}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds no keys such as endpoint, source and out")
    try:
        return Generation.model_validate({**content, **(changes or {})})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(step) for step in first["loc"])
        raise ConfigError(f"{path}: {where + ': ' if where else ''}{first['msg']}") from None
