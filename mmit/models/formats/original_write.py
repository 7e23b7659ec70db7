"""A model in the layout of LLaVA's original code, so that it opens there and in what grew out of it.

The tower's weights lie in the checkpoint, as in LLaVA 1.6 (``unfreeze_mm_vision_tower`` makes the original code read
them). Where the tower has no name on the hub it lies beside them too, in ``vision_tower/``, for its configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmit.models import hub_files
from mmit.models.connectors import MlpProjector
from mmit.models.encoders import LayeredTower
from mmit.models.formats import llava
from mmit.models.formats.contents import Json, read_json, write_json
from mmit.models.formats.form import Writer
from mmit.models.formats.original_images import original_fields
from mmit.models.formats.original_names import original_name_of
from mmit.models.layout import hub_form
from mmit.models.loaded import LoadedModel
from mmit.models.vlm import VisionLanguageModel
from mmit.tiling import Anyres
from mmit.tokenizer import IMAGE_TEXT

TOWER_FOLDER = "vision_tower"
"""Folder of a written directory with its tower, where that has no name on the hub."""

# language model's type in transformers -> model_type and class of the original code
_CLASSES = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "mixtral": ("llava_mixtral", "LlavaMixtralForCausalLM"),
    "qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
    "gemma": ("llava_gemma", "LlavaGemmaForCausalLM"),
}


def why_not(model: VisionLanguageModel) -> str | None:
    """Why the original code cannot hold this model, or None where it can."""
    kind = model.language_model.config.get_text_config().model_type
    tower, tiling = model.vision_tower, model.spec.tiling
    form = hub_form(tower)
    if kind not in _CLASSES:
        return f"it has no class for a language model of type {kind} (only {', '.join(_CLASSES)})"
    if form is None or form.config["model_type"] != "clip_vision_model":
        return "its vision towers are CLIP"
    assert isinstance(tower, LayeredTower), "only such a tower has a hub form"
    if not isinstance(hub_files.feature_layer(tower), int):
        return "it reads one layer of the tower"
    if not isinstance(model.multi_modal_projector, MlpProjector):
        return f"its projectors are linear layers, this connector is {type(model.multi_modal_projector).__name__}"
    if tiling is not None and not isinstance(tiling, Anyres):
        return f"it cuts pictures by anyres, this model by {type(tiling).__name__.lower()}"
    return llava.why_not_head(model)


def config(loaded: LoadedModel, dtype: torch.dtype) -> Json:
    """``config.json``: the language model's, with the original code's fields in it."""
    model = loaded.model
    tower, projector = model.vision_tower, model.multi_modal_projector
    assert isinstance(tower, LayeredTower), "why_not has seen to it"
    assert isinstance(projector, MlpProjector), "why_not has seen to it"
    text = hub_files.text_config(model.language_model, dtype=dtype)
    model_type, architecture = _CLASSES[text["model_type"]]
    return {
        **text,
        "architectures": [architecture],
        "model_type": model_type,
        "pad_token_id": loaded.pad_id,
        "mm_hidden_size": projector.width_in,
        # one layer too: the original code calls it mlp1x_gelu, and numbers it like the others
        "mm_projector_type": f"mlp{projector.depth}x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": f"<im_start>{IMAGE_TEXT}<im_end>" in loaded.template.jinja,
        "mm_vision_select_feature": "patch" if tower.drops_cls else "cls_patch",
        "mm_vision_select_layer": hub_files.feature_layer(tower),
        "mm_vision_tower": _hub_tower(loaded),
        "tokenizer_model_max_length": loaded.tokenizer.model_max_length,
        "tokenizer_padding_side": "right",
        "unfreeze_mm_vision_tower": True,
        "use_mm_proj": True,
        **original_fields(model.spec),
    }


def write_tower(loaded: LoadedModel, stored: Mapping[str, Tensor], fresh: Path, place: Path) -> None:
    """Lay the tower beside the weights and name it, where the hub has none; place: where ``fresh`` will stand."""
    if _hub_tower(loaded):
        return
    folder = fresh / TOWER_FOLDER
    folder.mkdir()
    tower = {
        name.removeprefix("vision_tower."): tensor
        for name, tensor in stored.items()
        if name.startswith("vision_tower.")
    }
    save_file(tower, folder / "model.safetensors", metadata={"format": "pt"})
    described = hub_files.vision_config(loaded.model.vision_tower)
    write_json(folder / "config.json", {**described, "architectures": ["CLIPVisionModel"]})
    write_json(folder / "preprocessor_config.json", _preprocessor(loaded))
    file = fresh / "config.json"
    # The original code takes it from the current directory, mmit from the checkpoint's: only a full path suits both.
    write_json(file, read_json(file) | {"mm_vision_tower": str(place.absolute() / TOWER_FOLDER)})


def _hub_tower(loaded: LoadedModel) -> str:
    """The name of the tower on the hub, or nothing; there it has its own input size."""
    encoder = loaded.encoder
    path = str(encoder.get("path", ""))
    is_there = encoder.get("type") == "transformers" and path.count("/") == 1 and encoder.get("image_size") is None
    return path if is_there and not path.startswith((".", "/", "~")) and not Path(path).exists() else ""


def _preprocessor(loaded: LoadedModel) -> Json:
    height, width = loaded.spec.size
    is_cropped = loaded.spec.resize != "squash"
    return {
        **hub_files.pixel_config(loaded.spec),
        "image_processor_type": "CLIPImageProcessor",
        "do_center_crop": is_cropped,
        "crop_size": {"height": height, "width": width},
        "size": {"shortest_edge": min(height, width)} if is_cropped else {"height": height, "width": width},
    }


WRITER = Writer(
    why_not=why_not,
    config=config,
    files=llava.no_files,
    more=write_tower,
    disk_name=original_name_of,
    processor_class="",
    on_request=True,
)
"""What ``mmit export --to llava`` writes."""
