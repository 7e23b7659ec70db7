"""What encoding data needs to know of a model, without the language model's weights: for plans and checks.

A plan of a 7 B model would otherwise read 28 GB only to learn how many tokens a picture takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import TypeAdapter
from transformers import AutoConfig, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from mmit.config import ComposedModel, WholeModel
from mmit.config import Connector as ConnectorSection
from mmit.encoding import Style
from mmit.hub import revision_of
from mmit.images import ImageSpec
from mmit.instructions import InstructionReader
from mmit.models.build import image_spec
from mmit.models.connectors import Connector, build_connector, instruction_reader
from mmit.models.encoders import VisionEncoder, build_encoder, readable
from mmit.models.formats.contents import buildable
from mmit.models.load import chosen_template, open_section
from mmit.templates import ChatTemplate
from mmit.tokenizer import add_tokens, load_tokenizer, prepare_tokenizer


@dataclass(frozen=True, kw_only=True)
class Outline:
    """How a model's samples are encoded; the same as in the ``LoadedModel`` of the same section.

    context: most tokens that the language model says it takes; 0 where it says nothing.
    """

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    spec: ImageSpec
    image_id: int
    pad_id: int
    style: Style
    instructions: InstructionReader | None = None
    context: int = 0


def read_outline(section: ComposedModel | WholeModel) -> Outline:
    """The outline of a run file's ``model`` section. Raises ConfigError or CheckpointError."""
    return _of_directory(section) if isinstance(section, WholeModel) else _of_parts(section)


def _of_parts(section: ComposedModel) -> Outline:
    path = section.language_model.path
    tower = build_encoder(section.encoder, dtype=torch.float32)
    assert isinstance(tower, VisionEncoder), "build_encoder checks it"
    with readable(path, key="model.language_model.path", what="a causal language model"):
        config: Any = AutoConfig.from_pretrained(path, revision=revision_of(path)).get_text_config()
    connector = _connector(section.connector, tower, config.hidden_size)
    prepared = prepare_tokenizer(load_tokenizer(path), rows=config.vocab_size)
    add_tokens(prepared.tokenizer, section.language_model.new_tokens)
    return Outline(
        tokenizer=prepared.tokenizer,
        template=ChatTemplate.load(section.language_model.template, prepared.tokenizer),
        spec=image_spec(section, tower, connector),
        image_id=prepared.image_id,
        pad_id=prepared.pad_id,
        style=section.language_model.text_style,
        instructions=instruction_reader(connector),
        context=_context(config),
    )


def _of_directory(section: WholeModel) -> Outline:
    contents, form = open_section(section)
    prepared = form.tokenizer(contents)
    with buildable(contents.directory):
        with no_init_weights():
            tower, _ = form.tower(contents, torch.float32)
        assert isinstance(tower, VisionEncoder)
        text = form.text_config(contents)
        text_config: Any = AutoConfig.for_model(text.get("model_type", "llama"), **_without_type(text))
        described = TypeAdapter(ConnectorSection).validate_python(form.connector(contents))
        connector = _connector(described, tower, text_config.hidden_size)
        spec = form.spec(contents, tower.image, connector.tokens(tower.patches))
    return Outline(
        tokenizer=prepared.tokenizer,
        template=chosen_template(section, contents, form, prepared.tokenizer),
        spec=spec,
        image_id=prepared.image_id,
        pad_id=prepared.pad_id,
        style=form.style(contents),
        instructions=instruction_reader(connector),
        context=_context(text_config),
    )


def _context(text_config: Any) -> int:  # noqa: ANN401  (each family has its own class)
    return int(getattr(text_config, "max_position_embeddings", None) or 0)


def _without_type(text_config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in text_config.items() if name != "model_type"}


def _connector(section: ConnectorSection, tower: VisionEncoder, width_out: int) -> Connector:
    with no_init_weights():
        made = build_connector(
            section, width_in=tower.width, width_out=width_out, patches=tower.patches, seed=0, dtype=torch.float32
        )
    assert isinstance(made, Connector), "build_connector checks it"
    return made
