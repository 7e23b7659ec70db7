"""LLaVA-NeXT and LLaVA-OneVision in the layout of transformers: models that cut a picture into tiles.

Both hold the same tensors as LLaVA, and ``image_newline``. transformers lists the pinpoints as (height, width), LLaVA
and run files as (width, height). They are swapped pair by pair, in their order, on reading and on writing: of two
equally good grids the first is taken, so a model chooses the same grids here, there and in LLaVA's code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from mmit.errors import CheckpointError, ConfigError
from mmit.images import ImageSpec
from mmit.models import hub_files
from mmit.models.adapter_names import transformers_name
from mmit.models.encoders import ImageInput, LayeredTower
from mmit.models.formats import llava
from mmit.models.formats.contents import Contents, Json
from mmit.models.formats.form import Writer
from mmit.models.loaded import LoadedModel
from mmit.models.tiling import GRIDS
from mmit.models.vlm import VisionLanguageModel
from mmit.tiling import Anyres

VIDEO_TOKEN = "<video>"  # noqa: S105 - not a password

Pairs = list[list[int]]


def next_spec(contents: Contents, image: ImageInput, tokens: int) -> ImageSpec:
    """The image spec of ``mmit.json``, or the one of transformers' LLaVA-NeXT."""
    default = [[336 * rows, 336 * columns] for columns, rows in GRIDS["llava_next"]]
    return _spec(contents, image, tokens, default=default, shrink_to=0, several="tiled")


def onevision_tower(contents: Contents, dtype: torch.dtype) -> tuple[nn.Module, Json]:
    """The encoder, by transformers' defaults for this class where ``config.json`` leaves them out."""
    defaults = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    return llava.tower(replace(contents, config=defaults | contents.config), dtype)


def onevision_spec(contents: Contents, image: ImageInput, tokens: int) -> ImageSpec:
    """The image spec of ``mmit.json``, or the one of transformers' LLaVA-OneVision."""
    default = [[384 * rows, 384 * columns] for rows, columns in GRIDS["onevision"]]
    word = str(contents.config.get("vision_aspect_ratio", "anyres_max_9"))
    if not word.removeprefix("anyres_max_").isdecimal():
        raise CheckpointError(f"{contents.directory}/config.json: vision_aspect_ratio '{word}' is not anyres_max_N")
    return _spec(
        contents, image, tokens, default=default, shrink_to=int(word.removeprefix("anyres_max_")), several="whole"
    )


def _spec(
    contents: Contents,
    image: ImageInput,
    tokens: int,
    *,
    default: Pairs,
    shrink_to: int,
    several: Literal["tiled", "whole"],
) -> ImageSpec:
    if "images" in contents.own:
        return ImageSpec.from_dict(contents.own["images"])
    pairs = contents.config.get("image_grid_pinpoints") or default
    cut_by = contents.image_processor().get("image_grid_pinpoints", pairs)
    if pairs != cut_by:
        raise CheckpointError(
            f"{contents.directory}: config.json has image_grid_pinpoints {pairs}, the image processor {cut_by}; make "
            "them the same"
        )
    try:
        return ImageSpec(
            size=image.size,
            mean=image.mean,
            std=image.std,
            resize="pad",
            tokens_per_tile=tokens,
            tiling=Anyres(
                pinpoints=tuple((int(width), int(height)) for height, width in pairs),
                shrink_to=shrink_to,
                several=several,
            ),
        )
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{contents.directory}: image_grid_pinpoints {pairs} cannot be read: {error}") from error


def _why_not(model: VisionLanguageModel, what: str, fits: Callable[[Anyres], bool]) -> str | None:
    tiling = model.spec.tiling
    if not isinstance(tiling, Anyres) or not tiling.unpad or not fits(tiling):
        return f"{what}, and this model's tiling is {tiling or 'none'}"
    reason = llava.why_not_parts(model)
    if reason is None and model.spec.size[0] != model.spec.size[1]:
        return "its tiles are squares"
    return reason


def why_not_next(model: VisionLanguageModel) -> str | None:
    """Why LlavaNextForConditionalGeneration cannot hold this model, or None where it can."""
    return _why_not(
        model,
        "LlavaNext cuts each of several images by anyres, unpads and never shrinks",
        lambda tiling: not tiling.shrink_to and tiling.several == "tiled",
    )


def why_not_onevision(model: VisionLanguageModel) -> str | None:
    """Why LlavaOnevisionForConditionalGeneration cannot hold this model, or None where it can."""
    if model.spec.resize != "pad":
        return f"LlavaOnevision pads each of several images to a square, this model takes them by '{model.spec.resize}'"
    return _why_not(
        model,
        "LlavaOnevision cuts a single image by anyres, unpads and shrinks to some number of tiles",
        lambda tiling: tiling.shrink_to > 0 and tiling.several == "whole",
    )


def _pinpoints(spec: ImageSpec) -> Pairs:
    assert isinstance(spec.tiling, Anyres), "why_not has seen to it"
    return [[height, width] for width, height in spec.tiling.pinpoints]


def _config(loaded: LoadedModel, dtype: torch.dtype, *, architecture: str, model_type: str) -> Json:
    return {
        **llava.config(loaded, dtype),
        "architectures": [architecture],
        "model_type": model_type,
        "image_grid_pinpoints": _pinpoints(loaded.spec),
        "use_image_newline_parameter": True,
    }


def next_config(loaded: LoadedModel, dtype: torch.dtype) -> Json:
    """``config.json`` of a LLaVA-NeXT model."""
    return _config(loaded, dtype, architecture="LlavaNextForConditionalGeneration", model_type="llava_next")


def onevision_config(loaded: LoadedModel, dtype: torch.dtype) -> Json:
    """``config.json`` of a LLaVA-OneVision model."""
    config = _config(loaded, dtype, architecture="LlavaOnevisionForConditionalGeneration", model_type="llava_onevision")
    # transformers compares ids with it; none is -1
    video = loaded.tokenizer.get_vocab().get(VIDEO_TOKEN, -1)
    return config | {"video_token_index": video, "vision_aspect_ratio": _aspect_ratio(loaded.spec)}


def next_files(loaded: LoadedModel) -> dict[str, Json]:
    """The processor's settings, for transformers 4 and 5."""
    side = loaded.spec.size[0]
    preprocessor = {
        **hub_files.pixel_config(loaded.spec),
        "image_processor_type": "LlavaNextImageProcessor",
        "processor_class": "LlavaNextProcessor",
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_pad": True,
        "image_grid_pinpoints": _pinpoints(loaded.spec),
    }
    return {
        "preprocessor_config.json": preprocessor,
        "processor_config.json": hub_files.processor_config(loaded.model) | {"processor_class": "LlavaNextProcessor"},
    }


def onevision_files(loaded: LoadedModel) -> dict[str, Json]:
    """The processor's settings, for transformers 4 and 5."""
    spec, tower = loaded.spec, loaded.model.vision_tower
    assert isinstance(tower, LayeredTower), "only such a tower has a hub form"
    height, width = spec.size
    common = {
        **hub_files.pixel_config(spec),
        "processor_class": "LlavaOnevisionProcessor",
        "size": {"height": height, "width": width},
    }
    strategy = hub_files.select_strategy(tower)
    return {
        "preprocessor_config.json": {
            **common,
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "do_pad": True,
            "image_grid_pinpoints": _pinpoints(spec),
        },
        "video_preprocessor_config.json": {**common, "video_processor_type": "LlavaOnevisionVideoProcessor"},
        "processor_config.json": {
            "image_token": hub_files.IMAGE_TOKEN,
            # transformers takes one off again where the class token is dropped
            "num_image_tokens": spec.tokens_per_tile + (strategy == "default"),
            "processor_class": "LlavaOnevisionProcessor",
            "video_token": VIDEO_TOKEN,
            "vision_aspect_ratio": _aspect_ratio(spec),
            "vision_feature_select_strategy": strategy,
        },
    }


def _aspect_ratio(spec: ImageSpec) -> str:
    assert isinstance(spec.tiling, Anyres), "why_not has seen to it"
    return f"anyres_max_{spec.tiling.shrink_to}"


def _is(model_type: str) -> Callable[[Contents], bool]:
    return lambda contents: contents.config.get("model_type") == model_type


LLAVA_NEXT = replace(
    llava.LLAVA,
    name="llava_next",
    title="LLaVA-NeXT in the layout of transformers",
    recognises=_is("llava_next"),
    spec=next_spec,
    write=Writer(
        why_not=why_not_next,
        config=next_config,
        files=next_files,
        processor_class="LlavaNextProcessor",
        module_name=transformers_name,
        opens_as="LlavaNextForConditionalGeneration",
    ),
)

LLAVA_ONEVISION = replace(
    llava.LLAVA,
    name="llava_onevision",
    title="LLaVA-OneVision in the layout of transformers",
    recognises=_is("llava_onevision"),
    tower=onevision_tower,
    spec=onevision_spec,
    write=Writer(
        why_not=why_not_onevision,
        config=onevision_config,
        files=onevision_files,
        processor_class="LlavaOnevisionProcessor",
        module_name=transformers_name,
        opens_as="LlavaOnevisionForConditionalGeneration",
    ),
)
