"""Formats: the layouts of model directories that can be read and written, one module each, and the table of them.

    directory --read_contents--> Contents --detect--> Format --> tower, connector, tokenizer, spec, tensors

A format is found by what a directory holds, never by its name. A new one is a module with a ``Format`` and a line in
the table.
"""

from __future__ import annotations

from mmit.encoding import Style
from mmit.errors import CheckpointError, ConfigError
from mmit.models.formats.contents import Contents, read_contents, read_json, write_json
from mmit.models.formats.foreign import refusal
from mmit.models.formats.form import Format, Target, Writer
from mmit.models.formats.instructblip import INSTRUCTBLIP
from mmit.models.formats.llava import LLAVA
from mmit.models.formats.llava_next import LLAVA_NEXT, LLAVA_ONEVISION
from mmit.models.formats.original import ORIGINAL
from mmit.models.formats.own import OWN
from mmit.models.loaded import FORMAT
from mmit.models.vlm import VisionLanguageModel

FORMATS: tuple[Format, ...] = (ORIGINAL, LLAVA, LLAVA_NEXT, LLAVA_ONEVISION, INSTRUCTBLIP, OWN)
"""All formats, in the order in which they are asked; for writing, the first one that can hold the model is taken.

The original code's comes first: its directories may call themselves ``llava`` too, and would else be taken for a model
of transformers with a default language model of 7 B."""

__all__ = [
    "FORMATS",
    "Contents",
    "Format",
    "Target",
    "Writer",
    "choose_target",
    "detect",
    "read_contents",
    "read_json",
    "write_json",
]


def detect(contents: Contents) -> Format:
    """The format of a model directory. Raises CheckpointError for one that is unknown or cannot be read."""
    directory, config = contents.directory, contents.config
    number = contents.own.get("format", 0)
    if not isinstance(number, int) or number > FORMAT:
        raise CheckpointError(
            f"{directory}/mmit.json has format {contents.own['format']}, newer than {FORMAT}: update mmit"
        )
    for form in FORMATS:
        if form.recognises(contents):
            if (contents.base or contents.tower) and not form.names_parts:
                raise ConfigError(f"{directory} is whole ({form.title}); leave out base and tower")
            form.check(contents)
            return form
    if (sentence := refusal(contents)) is not None:
        raise CheckpointError(sentence)
    titles = "; ".join(form.title for form in FORMATS)
    raise CheckpointError(
        f"{directory} holds a model of type '{config.get('model_type')}', which is none of the formats that can be "
        f"read: {titles}"
    )


def choose_target(model: VisionLanguageModel, style: Style) -> Target:
    """The first format that can hold ``model``; at last mmit's own, which holds every one.

    style: how text around images is tokenized for the model.
    """
    refused: list[str] = []
    for form in FORMATS:
        if form.write is None or form.write.on_request:
            continue
        reason = form.write.why_not(model)
        if reason is None and form.write.style not in ("", style):
            reason = (
                f"its processor writes text in the style '{form.write.style}', this model reads '{style}' "
                "(model.language_model.text_style)"
            )
        if reason is None:
            return Target(form.name, form.write, tuple(refused))
        refused.append(reason)
    raise AssertionError("mmit's own layout holds every model")
