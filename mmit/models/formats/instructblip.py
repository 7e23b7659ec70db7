"""InstructBLIP in the layout of transformers (``InstructBlipForConditionalGeneration``), with a decoder-only LLM.

Its connector is the Q-Former that reads the question (``connectors/qformer``); its tokenizer lies in
``qformer_tokenizer/``. transformers puts the image tokens in front of the start token: the text style ``blip``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from mmit.encoding import Style
from mmit.errors import CheckpointError
from mmit.models import hub_files
from mmit.models.connectors.qformer import QFormer
from mmit.models.encoders import TransformersTower, tower_from_config
from mmit.models.formats import llava
from mmit.models.formats.contents import Contents, Json
from mmit.models.formats.form import Format, Writer
from mmit.models.formats.parts import INSTRUCTION_TOKENIZER, section_of
from mmit.models.loaded import LoadedModel
from mmit.models.stored import Source, StoredTensors, weight_files
from mmit.models.vlm import VisionLanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_QUESTION = 128
"""Tokens of a question that the Q-Former reads, as InstructBLIP was trained (LAVIS, ``max_txt_len``)."""

_TOWERS = ("instructblip_vision_model", "blip_2_vision_model")
_ON_DISK = (
    ("vision_tower.", "vision_model."),
    ("multi_modal_projector.qformer.", "qformer."),
    ("multi_modal_projector.query_tokens", "query_tokens"),
    ("multi_modal_projector.language_projection.", "language_projection."),
)
_FIXED = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "pad_token_id": 0}
_NEEDED = (
    (("tokenizer.json", "vocab.json", "tokenizer.model"), "the language model's tokenizer"),
    ((f"{INSTRUCTION_TOKENIZER}/tokenizer.json", f"{INSTRUCTION_TOKENIZER}/vocab.txt"), "the Q-Former's tokenizer"),
    (("preprocessor_config.json", "processor_config.json"), "mean and std of the pixels"),
)


def is_instructblip(contents: Contents) -> bool:
    """True where ``config.json`` is that of an InstructBLIP model of transformers."""
    return contents.config.get("model_type") == "instructblip"


def check(contents: Contents) -> None:
    """Raise CheckpointError for another kind of language model or Q-Former, and for files that are missing."""
    directory, config = contents.directory, contents.config
    contents.text_config()
    if config.get("use_decoder_only_language_model") is False:
        kind = contents.text_config().get("model_type")
        raise CheckpointError(f"{directory}: its language model ({kind}) has an encoder; decoder-only ones can be read")
    for part in ("qformer_config", "vision_config"):
        if not isinstance(config.get(part), dict):
            raise CheckpointError(f"{directory}/config.json lacks {part}")
    for name, value in _FIXED.items():
        if (found := config["qformer_config"].get(name, value)) != value:
            raise CheckpointError(f"{directory}/config.json: qformer_config.{name} {found}: only {value} can be read")
    missing = [
        f"{files[0]} ({what})" for files, what in _NEEDED if not any((directory / file).is_file() for file in files)
    ]
    if missing:
        raise CheckpointError(f"{directory} lacks {', '.join(missing)}; copy what is missing from the model's origin")


def tower(contents: Contents, dtype: torch.dtype) -> tuple[nn.Module, Json]:
    """The tower with unset weights, read at its last layer with the final norm and with the class token."""
    section = section_of(contents, "encoder", default={"type": "transformers", "path": str(contents.directory)})
    config = {"model_type": _TOWERS[0], **contents.config["vision_config"]}
    made = tower_from_config(config, contents.image_processor(), layer=-1, cls="keep", dtype=dtype)
    return made, section | {"layer": -1, "cls": "keep"}


def connector(contents: Contents) -> Json:
    """The section of the Q-Former."""
    config = contents.config["qformer_config"]
    positions = config.get("max_position_embeddings", 512)
    default = {
        "type": "qformer",
        "tokens": contents.config.get("num_query_tokens", 32),
        "hidden": config.get("hidden_size", 768),
        "depth": config.get("num_hidden_layers", 12),
        "heads": config.get("num_attention_heads", 12),
        "intermediate": config.get("intermediate_size", 3072),
        "cross_every": config.get("cross_attention_frequency", 2),
        "instruction": {
            "tokenizer": INSTRUCTION_TOKENIZER,
            "length": min(LONGEST_QUESTION, positions),
            "vocabulary": config.get("vocab_size", 30522),
            "positions": positions,
        },
    }
    return section_of(contents, "connector", default=default)


def style(contents: Contents) -> Style:
    """As ``mmit.json`` says, else ``blip``."""
    return contents.own.get("text_style", "blip")


def template(_: Contents, tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's own template, where it has one; Salesforce's directories have none."""
    return "own" if isinstance(tokenizer.chat_template, str) else "instructblip"


def tensors(contents: Contents, _: nn.Module) -> StoredTensors:
    """The weights."""
    return StoredTensors([Source(files=weight_files(contents.directory), rename=in_memory)], where=contents.directory)


def in_memory(stored: str) -> str:
    """The name of a stored tensor among those of ``layout.disk_names``."""
    return _renamed(stored, [(theirs, ours) for ours, theirs in _ON_DISK])


def on_disk(name: str) -> str:
    """InstructBLIP's name of a tensor."""
    return _renamed(name, _ON_DISK)


def module_name(module: str) -> str:
    """The name of a module in InstructBlipForConditionalGeneration."""
    return _renamed(f"{module}.".replace("vision_tower.model.", "vision_tower.", 1), _ON_DISK).removesuffix(".")


def why_not(model: VisionLanguageModel) -> str | None:
    """Why InstructBlipForConditionalGeneration cannot hold this model, or None where it can."""
    tower, projector = model.vision_tower, model.multi_modal_projector
    if model.spec.tiling is not None:
        return "InstructBlip has one tile for an image"
    if not isinstance(projector, QFormer) or not projector.reads_instruction:
        return "InstructBlip's connector is a Q-Former that reads the question"
    if not isinstance(tower, TransformersTower) or tower.model.config.model_type not in _TOWERS:
        return "InstructBlip's encoder is that of BLIP-2 and InstructBLIP"
    if tower.reads != (tower.depth,) or tower.drops_cls:
        return "InstructBlip reads its encoder at layer -1 and keeps the class token"
    if model.spec.resize != "squash":
        return f"InstructBlip squashes a picture to the encoder's size, this model takes it by '{model.spec.resize}'"
    return None


def config(loaded: LoadedModel, dtype: torch.dtype) -> Json:
    """``config.json`` of an InstructBLIP model."""
    model = loaded.model
    common = hub_files.common_config(model, pad_id=loaded.pad_id, dtype=dtype)
    for name in ("image_seq_length", "vision_feature_layer", "vision_feature_select_strategy"):
        common.pop(name)
    projector = model.multi_modal_projector
    assert isinstance(projector, QFormer), "why_not has seen to it"
    return {
        "architectures": ["InstructBlipForConditionalGeneration"],
        "model_type": "instructblip",
        **common,
        "vision_config": common["vision_config"] | {"model_type": _TOWERS[0]},
        "qformer_config": hub_files.plain_config(projector.qformer.config.to_dict()),
        "num_query_tokens": model.spec.tokens_per_tile,
        "use_decoder_only_language_model": True,
    }


def files(loaded: LoadedModel) -> dict[str, Json]:
    """The processor's settings, for transformers 4 and 5."""
    height, width = loaded.spec.size
    return {
        "preprocessor_config.json": {
            **hub_files.pixel_config(loaded.spec),
            "image_processor_type": "BlipImageProcessor",
            "processor_class": "InstructBlipProcessor",
            "size": {"height": height, "width": width},
        },
        "processor_config.json": {
            "num_query_tokens": loaded.spec.tokens_per_tile,
            "processor_class": "InstructBlipProcessor",
        },
    }


INSTRUCTBLIP = Format(
    name="instructblip",
    title="InstructBLIP in the layout of transformers",
    recognises=is_instructblip,
    check=check,
    tower=tower,
    connector=connector,
    text_config=Contents.text_config,
    tokenizer=llava.tokenizer,
    spec=llava.spec,
    style=style,
    tensors=tensors,
    template=template,
    write=Writer(
        why_not=why_not,
        config=config,
        files=files,
        processor_class="InstructBlipProcessor",
        disk_name=on_disk,
        module_name=module_name,
        style="blip",
        opens_as="InstructBlipForConditionalGeneration",
    ),
)


def _renamed(name: str, pairs: Sequence[tuple[str, str]]) -> str:
    for old, new in pairs:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
