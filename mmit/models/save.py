"""Write a model as one directory that transformers, vLLM and mmit open: all of it, or nothing.

A model with an adapter becomes a directory of peft's, with the whole model that the adapter stands beside in it.

Everything goes into a temporary directory beside the target, which takes its place at the end. A model that
transformers' LLaVA class cannot hold is written with the same names under mmit's own ``model_type``, and
``mmit.json`` says why.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from mmit.errors import CheckpointError
from mmit.models.adapter_names import BASE, has_adapter, is_adapter, plain_name
from mmit.models.encoders import describe_towers
from mmit.models.formats import Target, choose_target, write_json
from mmit.models.formats.form import Writer, nothing_more
from mmit.models.formats.own import OWN
from mmit.models.formats.parts import INSTRUCTION_TOKENIZER, connector_inside
from mmit.models.four_bits import packed_outline, unpacked
from mmit.models.layout import disk_names, hub_form, tensors_of, to_disk
from mmit.models.loaded import FORMAT, LoadedModel
from mmit.models.tensor_file import outlined
from mmit.models.weight_files import Frozen, WeightFiles, Weights

if TYPE_CHECKING:
    from torch import Tensor

SENTENCEPIECE = "tokenizer.model"
"""A Llama-type tokenizer in its first form."""

PACKAGES = ("torch", "transformers", "open_clip_torch", "timm", "deepspeed", "tokenizers", "safetensors")


def save_model(
    loaded: LoadedModel,
    state: Weights | Mapping[str, Tensor] | None,
    directory: Path | str,
    *,
    made_from: Mapping[str, Any],
    to: Target | None = None,
    place: Path | None = None,
    frozen: Frozen | None = None,
) -> None:
    """Write the model into ``directory``, replacing what is there.

    state: all tensors by their names in memory, where they are not in the model itself (ZeRO), or one after the other;
    tied names may occur twice. made_from: free facts for ``mmit.json`` (run, stage, base models). to: the format; None
    for the one that ``choose_target`` takes. place: where the directory will stand in the end; None for where it is
    written. frozen: of a model with an adapter, the weights that do not train go into files of their own. Raises
    CheckpointError where the disk refuses; then nothing has changed.
    """
    directory = Path(directory)
    fresh = directory.with_name(f".{directory.name}.writing")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        adapted = has_adapter(loaded.model)
        content = fresh / BASE if adapted else fresh
        content.mkdir(parents=True, exist_ok=True)
        place = place or directory
        target = to or choose_target(loaded.model, loaded.style)
        weights = state if isinstance(state, Weights) else Weights.of(_own(loaded) if state is None else state)
        of_adapter, stored = _write(loaded, weights, content, target, frozen=frozen if adapted else None)
        if target.writer.describes:
            own = _own_description(loaded, made_from)
            write_json(content / "mmit.json", own | _layout(target))
        target.writer.more(loaded, stored, content, place)
        if adapted:
            from mmit.models.adapter_files import write_adapter

            write_adapter(loaded.model, of_adapter, fresh, place=place, style=loaded.style)
        take_place(fresh, directory)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot write the model to {directory}: {reason}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _write(
    loaded: LoadedModel,
    weights: Weights,
    directory: Path,
    target: Target,
    *,
    frozen: Frozen | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Write weights and settings; gives the tensors of the adapter, and what ``more`` of the format is to have."""
    model, writer = loaded.model, target.writer
    given = {plain_name(name): tensor for name, tensor in weights.outline.items()}
    packed = dict(packed_outline(model))
    outline = {name: given[name] for name, _ in tensors_of(model)} | packed
    dtype = next(tensor.dtype for tensor in outline.values() if tensor.is_floating_point())
    write_json(directory / "config.json", writer.config(loaded, dtype))
    for name, content in writer.files(loaded).items():
        write_json(directory / name, content)
    _write_tokenizer(loaded, directory, processor_class=writer.processor_class)
    write_json(directory / "generation_config.json", _generation_config(loaded))
    if loaded.instructions is not None and writer.describes:
        loaded.instructions.tokenizer.save_pretrained(directory / INSTRUCTION_TOKENIZER)
    trained = [plain_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad]
    named = _on_disk(loaded, writer, {name: outlined(tensor) for name, tensor in outline.items()})
    of_trained = {writer.disk_name(name) for some in disk_names(model.vision_tower, trained).values() for name in some}
    files = WeightFiles(directory, named, frozen=frozen, trained=of_trained)
    of_adapter: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    try:
        for name, tensor in chain(weights.tensors, unpacked(model)):
            if is_adapter(name):
                of_adapter[name] = tensor.detach().cpu()
            elif plain_name(name) in outline:
                values = {plain_name(name): tensor.detach().cpu()}
                for on_disk, piece in _on_disk(loaded, writer, values).items():
                    files.put(on_disk, piece)
                if writer.more is not nothing_more:
                    kept |= to_disk(model.vision_tower, values)
        files.close()
    finally:
        files.abandon()
    return of_adapter, kept


def _on_disk(loaded: LoadedModel, writer: Writer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by their names in the format, those left out that it does not have."""
    stored = to_disk(loaded.model.vision_tower, tensors)
    return {on_disk: tensor for name, tensor in stored.items() if (on_disk := writer.disk_name(name)) is not None}


def _own(loaded: LoadedModel) -> dict[str, Tensor]:
    """The tensors of the model itself, those of an adapter too."""
    return dict(tensors_of(loaded.model)) | {
        name: parameter for name, parameter in loaded.model.named_parameters() if is_adapter(name)
    }


def _layout(target: Target) -> dict[str, Any]:
    """Which format this is, and why transformers has no class for a model that is in mmit's own."""
    refused = {"not_llava_because": "; ".join(target.refused)} if target.refused and target.name == OWN.name else {}
    return {"layout": target.name} | refused


def _write_tokenizer(loaded: LoadedModel, directory: Path, *, processor_class: str) -> None:
    tokenizer = loaded.tokenizer
    tokenizer.save_pretrained(directory)
    pieces = Path(tokenizer.name_or_path) / SENTENCEPIECE
    if pieces.is_file():
        # what LLaVA's original code, llama.cpp and slow tokenizers read
        shutil.copyfile(pieces, directory / SENTENCEPIECE)
    (directory / "chat_template.jinja").write_text(loaded.template.jinja, encoding="utf-8")
    file = directory / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("chat_template", None)
    config.pop("processor_class", None)
    if processor_class:
        config["processor_class"] = processor_class
    if str(config.get("tokenizer_class", "")).startswith("LlamaTokenizer"):
        # transformers 5 does not save it, and 4 takes True where it is not said: other ids after every </s>
        config["legacy"] = bool(getattr(tokenizer, "legacy", False))
    write_json(file, config)


def _generation_config(loaded: LoadedModel) -> dict[str, Any]:
    config: dict[str, Any] = {"eos_token_id": list(loaded.template.stop_ids), "pad_token_id": loaded.pad_id}
    if loaded.tokenizer.bos_token_id is not None:
        config["bos_token_id"] = loaded.tokenizer.bos_token_id
    return config


def _own_description(loaded: LoadedModel, made_from: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "template": loaded.template.name,
        "text_style": loaded.style,
        "images": loaded.model.spec.to_dict(),
        **({} if loaded.model.vocabulary is None else {"vocabulary": loaded.model.vocabulary}),
        **({"new_tokens": list(loaded.model.new_ids)} if loaded.model.new_ids else {}),
        "encoder": dict(loaded.encoder),
        **_towers(loaded),
        "connector": connector_inside(loaded.connector),
        "made_from": dict(made_from),
        "packages": {"mmit": _version("mmit")} | {name: _version(name) for name in PACKAGES},
    }


def _towers(loaded: LoadedModel) -> dict[str, Any]:
    """The architecture of encoders that no class of transformers holds, from which they are built again offline."""
    tower = loaded.model.vision_tower
    return {} if hub_form(tower) is not None else {"towers": describe_towers(tower, loaded.encoder)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def take_place(fresh: Path, directory: Path) -> None:
    """Put ``fresh`` where ``directory`` is; at no moment is there half a model under that name."""
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        os.rename(directory, old)
    os.rename(fresh, directory)
    shutil.rmtree(old, ignore_errors=True)
