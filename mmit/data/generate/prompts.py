"""From an annotation to what a language model is asked: the request's body, and a hash that names it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mmit.data.construct.annotation import Annotation
from mmit.data.construct.boxes import Size, write_box
from mmit.data.construct.draw import Draw
from mmit.data.faults import SampleError
from mmit.errors import ConfigError

Kind = Literal["conversation", "description", "reasoning"]
See = Literal["text", "image", "both"]

SHIPPED = Path(__file__).with_name("prompts.yaml")
MOST_BOXES = 60
_PICTURE = {"type": "image_url", "image_url": {"url": ""}}  # the client puts the picture in when it sends


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Example(_Section):
    """A picture in words (boxes are label, left, top, right, bottom as fractions), and what to write about it."""

    captions: list[str]
    boxes: list[tuple[str, float, float, float, float]] = []
    answer: str


class Prompt(_Section):
    """What to write: the system's text, the end of the user's, examples, and the questions that descriptions answer."""

    system: str
    request: str
    examples: list[Example] = []
    questions: list[str] = []


class Prompts(_Section):
    """All prompts, and what stands for ``{given}`` in them by what the model sees."""

    given: dict[See, str]
    conversation: Prompt
    description: Prompt
    reasoning: Prompt


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question to the language model. ``messages`` hold an empty URL where the picture goes.

    question: what the user asks in the record, where the model does not write that itself; wording: its number.
    """

    kind: Kind
    id: str
    image: str
    messages: tuple[Mapping[str, Any], ...]
    question: str = ""
    wording: int = 0
    meta: Mapping[str, Any]

    def key(self, settings: Mapping[str, Any]) -> str:
        """A hash of kind, id, picture, messages and the settings of the endpoint that change the answer."""
        content = [self.kind, self.id, self.image, list(self.messages), self.question, dict(settings)]
        text = json.dumps(content, ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def load_prompts(path: Path | None) -> Prompts:
    """The prompts in a file; None takes those of mmit. Raises ConfigError."""
    place = path or SHIPPED
    try:
        prompts = Prompts.model_validate(yaml.safe_load(place.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{place}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"{place}: {'.'.join(str(s) for s in first['loc'])}: {first['msg']}") from None
    if not prompts.description.questions:
        raise ConfigError(f"{place}: description.questions is missing: what the user asks for a description")
    return prompts


def make_request(
    annotation: Annotation, kind: Kind, prompts: Prompts, *, see: See, size: Size = (0, 0), seed: int = 0
) -> Request:
    """The request for an annotation. ``size``: (width, height) of the picture, needed where it has boxes in the text.

    Raises SampleError: nothing to write from.
    """
    prompt: Prompt = getattr(prompts, kind)
    given = prompts.given.get(see, "")
    messages: list[Mapping[str, Any]] = [{"role": "system", "content": prompt.system.replace("{given}", given).strip()}]
    notes = "" if see == "image" else _notes(annotation, size)
    if see == "text":
        for example in prompt.examples:
            boxes = [f"{label}: [{', '.join(f'{n:.3f}' for n in four)}]" for label, *four in example.boxes]
            messages.append({"role": "user", "content": f"{_listed(example.captions, boxes)}\n\n{prompt.request}"})
            messages.append({"role": "assistant", "content": example.answer.strip()})
    text = f"{notes}\n\n{prompt.request}" if notes else prompt.request
    content: Any = text if see == "text" else [_PICTURE, {"type": "text", "text": text}]
    messages.append({"role": "user", "content": content})
    wording = Draw(seed, annotation.id).index(f"generate/{kind}", max(1, len(prompt.questions)))
    return Request(
        kind=kind,
        id=annotation.id,
        image=annotation.image,
        messages=tuple(messages),
        question=prompt.questions[wording] if kind == "description" else "",
        wording=wording,
        meta=annotation.meta,
    )


def _notes(annotation: Annotation, size: Size) -> str:
    sentences = [*annotation.captions, *([annotation.description] if annotation.description else [])]
    named = [region for region in annotation.regions if region.label or region.phrase]
    if not sentences and not named:
        raise SampleError("it has neither captions nor boxes with names to write from")
    boxes = [
        f"{region.phrase or region.label}: {write_box(annotation.box(region, size), 'xyxy01', size)}"
        for region in named[:MOST_BOXES]
    ]
    return _listed(sentences, boxes)


def _listed(sentences: list[str], boxes: list[str]) -> str:
    parts = []
    if sentences:
        parts.append("Sentences about the picture:\n" + "\n".join(f"- {sentence}" for sentence in sentences))
    if boxes:
        parts.append("Things in it and their places:\n" + "\n".join(f"- {box}" for box in boxes))
    return "\n\n".join(parts)
