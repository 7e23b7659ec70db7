"""What a format is: how a directory of this layout is known, read and written.

A format answers questions about a directory before any weight is read: its tower and language model as frames without
weights, the run-file section of its connector, its tokenizer and image spec, and where each tensor lies. ``load`` puts
the answers together, ``outline`` asks only what encoding data needs, ``save`` uses the writer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mmit.encoding import Style
from mmit.images import ImageSpec
from mmit.models.encoders import ImageInput
from mmit.models.formats.contents import Contents, Json
from mmit.models.loaded import LoadedModel
from mmit.models.stored import StoredTensors
from mmit.models.vlm import VisionLanguageModel
from mmit.templates import ChatTemplate
from mmit.tokenizer import PreparedTokenizer


def nothing_more(_: LoadedModel, __: Mapping[str, Tensor], fresh: Path, place: Path) -> None:
    """For formats that are files and tensors alone."""
    del fresh, place


@dataclass(frozen=True, kw_only=True)
class Writer:
    """How a model is written in a format.

    why_not: why the format cannot hold a model, or None where it can. config: ``config.json``. files: the further JSON
    files, by name. more: what else it writes, given the tensors under their hub names, the directory being written and
    the place where it will stand. processor_class: in the tokenizer's settings; empty where there is no processor.
    disk_name: the format's name for a tensor that the hub's LLaVA models call so (see layout.py), None to leave it out.
    opens_as: the class of transformers that opens it; empty where there is none. on_request: it is never chosen where
    no format was asked for. describes: whether ``mmit.json`` is written. module_name: what a module is called in the
    class that opens the format, for the files of an adapter. style: how the format's processor writes text around
    images; "" for any.
    """

    why_not: Callable[[VisionLanguageModel], str | None]
    config: Callable[[LoadedModel, torch.dtype], Json]
    files: Callable[[LoadedModel], Mapping[str, Json]]
    more: Callable[[LoadedModel, Mapping[str, Tensor], Path, Path], None] = nothing_more
    processor_class: str = "LlavaProcessor"
    disk_name: Callable[[str], str | None] = str
    opens_as: str = ""
    on_request: bool = False
    describes: bool = True
    module_name: Callable[[str], str] = str
    style: Style | Literal[""] = ""


@dataclass(frozen=True)
class Target:
    """What a model is written as: the format's name, its writer, and why the formats that were asked before refuse."""

    name: str
    writer: Writer
    refused: tuple[str, ...] = ()


def the_own_template(_: Contents, __: PreTrainedTokenizerBase) -> str:
    """The directory's tokenizer carries the template."""
    return "own"


def as_it_is(_: Contents, template: ChatTemplate) -> ChatTemplate:
    """The template needs no change."""
    return template


@dataclass(frozen=True, kw_only=True)
class Format:
    """One layout of model directories. All functions raise CheckpointError that names the file.

    name: in ``mmit.json`` and on the command line. title: in messages. recognises: by contents, never by a path.
    check: refuses what is recognised but cannot be read. tower: the encoder with unset weights, and the run-file
    section that describes it. connector: the section that describes it. tokenizer: with ``<image>`` and padding, whose
    image id is the model's. spec: from what the tower takes and the image tokens of a tile. style: how text around
    images is tokenized. tensors: the weights by the names of ``layout.disk_names``, for this tower. template: what
    ``own`` means for this directory. adapt_template: what its prompts have that no template knows of.
    names_parts: it may name its language model or tower instead of holding it, so
    that ``base`` and ``tower`` of a run file have a meaning. adds_tokens: its tokenizer knows neither ``<image>`` nor
    padding, so that the token table may have to grow.
    """

    name: str
    title: str
    recognises: Callable[[Contents], bool]
    check: Callable[[Contents], None]
    tower: Callable[[Contents, torch.dtype], tuple[nn.Module, Json]]
    connector: Callable[[Contents], Json]
    text_config: Callable[[Contents], Json]
    tokenizer: Callable[[Contents], PreparedTokenizer]
    spec: Callable[[Contents, ImageInput, int], ImageSpec]
    style: Callable[[Contents], Style]
    tensors: Callable[[Contents, nn.Module], StoredTensors]
    template: Callable[[Contents, PreTrainedTokenizerBase], str] = the_own_template
    adapt_template: Callable[[Contents, ChatTemplate], ChatTemplate] = as_it_is
    names_parts: bool = False
    adds_tokens: bool = False
    write: Writer | None = None
