"""Reading weights is strict: what is wrong is listed, with names, before anything is changed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmit.config import ComposedModel
from mmit.errors import CheckpointError
from mmit.models import LoadedModel, build_model, load_model, load_weights, save_model

Build = Callable[..., LoadedModel]
Change = Callable[[dict[str, Tensor]], None]

LAYER = "language_model.model.layers.0.mlp.up_proj.weight"
TOWER = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"


@pytest.fixture
def directory(build: Build, tmp_path: Path) -> Path:
    save_model(build(), None, tmp_path / "model", made_from={})
    return tmp_path / "model"


def change(directory: Path, edit: Change) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors[LAYER]
    del tensors[TOWER]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["language_model.model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)


def empty(tensors: dict[str, Tensor]) -> None:
    tensors[LAYER] = torch.zeros((0,))


def reshape(tensors: dict[str, Tensor]) -> None:
    tensors[LAYER] = tensors[LAYER].T


def spoil(tensors: dict[str, Tensor]) -> None:
    tensors[LAYER][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop, f"2 missing: {TOWER}, {LAYER}|2 missing: {LAYER}, {TOWER}"),
        (add, r"1 unexpected: language_model\.model\.layers\.7\.mlp\.up_proj\.weight"),
        (empty, f"1 empty: {LAYER}"),
        (reshape, rf"1 of another shape: {LAYER} is \[32, 64\], needed is \[64, 32\]"),
        (spoil, f"1 with values that are not finite: {LAYER}"),
    ],
)
def test_a_tensor_that_does_not_fit_is_listed(directory: Path, edit: Change, message: str) -> None:
    change(directory, edit)
    with pytest.raises(CheckpointError, match=message):
        load_model(directory, dtype=torch.float32)


def test_a_long_list_is_cut(directory: Path) -> None:
    def drop_many(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "layers.1." in name]:
            del tensors[name]

    change(directory, drop_many)
    with pytest.raises(CheckpointError, match=r"25 missing: .* and 20 more$"):
        load_model(directory, dtype=torch.float32)


def test_weights_that_do_not_fit_change_nothing(directory: Path, build: Build) -> None:
    change(directory, drop)
    fresh = build(seed=9)
    before = {name: tensor.clone() for name, tensor in fresh.model.state_dict().items()}
    with pytest.raises(CheckpointError, match="2 missing"):
        load_weights(fresh.model, directory)
    assert all(torch.equal(before[name], tensor) for name, tensor in fresh.model.state_dict().items())


def test_a_tied_head_that_differs_from_its_table_is_an_error(build: Build, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    save_model(build("siglip_qwen2"), None, directory, made_from={})
    table = "language_model.model.embed_tokens.weight"

    def same(tensors: dict[str, Tensor]) -> None:
        tensors["language_model.lm_head.weight"] = tensors[table].clone()

    def other(tensors: dict[str, Tensor]) -> None:
        tensors["language_model.lm_head.weight"] = tensors[table] + 1

    change(directory, same)
    load_model(directory, dtype=torch.float32)
    change(directory, other)
    with pytest.raises(CheckpointError, match=r"tied to: language_model\.lm_head\.weight"):
        load_model(directory, dtype=torch.float32)


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_a_truncated_file_is_named(directory: Path, keep: int) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or incomplete"):
        load_model(directory, dtype=torch.float32)


def test_the_three_layouts_of_transformers_are_read(directory: Path, tmp_path: Path) -> None:
    """Names as transformers 5 saves an assembled model, and as it keeps them in memory."""
    expected = load_model(directory, dtype=torch.float32).model.state_dict()
    renamings: list[Callable[[str], str]] = [
        lambda name: name.replace("vision_tower.vision_model.", "vision_tower."),
        lambda name: (
            name.replace("vision_tower.vision_model.", "model.vision_tower.")
            .replace("multi_modal_projector.", "model.multi_modal_projector.")
            .replace("language_model.lm_head.", "lm_head.")
            .replace("language_model.model.", "model.language_model.")
        ),
    ]
    for number, rename in enumerate(renamings):
        copy = shutil.copytree(directory, tmp_path / f"copy{number}")
        tensors = load_file(copy / "model.safetensors")
        renamed = {rename(name): tensor for name, tensor in tensors.items()}
        assert not renamed.keys() & {TOWER}
        save_file(renamed, copy / "model.safetensors")
        found = load_model(copy, dtype=torch.float32).model.state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_pickled_weights_give_the_same_model(directory: Path) -> None:
    expected = load_model(directory, dtype=torch.float32).model.state_dict()
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    found = load_model(directory, dtype=torch.float32).model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class _Malice:
    """What an attacker puts in a pickle: a call that is made while it is opened."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_pickle_with_code_in_it_is_refused_and_the_code_is_not_run(
    directory: Path, tmp_path: Path, as_zip: bool
) -> None:
    proof = tmp_path / "the-code-ran"
    content = {"language_model.lm_head.weight": _Malice(proof)}
    torch.save(content, directory / "pytorch_model.bin", _use_new_zipfile_serialization=as_zip)
    (directory / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin is a pickle that asks for more .*system.*may carry code"
    ):
        load_model(directory, dtype=torch.float32)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no pickle at all", "is damaged, or no file of tensors"),
        ([1, 2], "holds a list, not tensors by their names"),
        ({"epoch": 3, "state_dict": {}}, r"holds more than tensors by their names \(epoch, state_dict\)"),
    ],
)
def test_a_pickle_that_holds_no_weights_is_named(directory: Path, content: object, message: str) -> None:
    file = directory / "pytorch_model.bin"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=message):
        load_model(directory, dtype=torch.float32)


@pytest.mark.parametrize(
    ("change_config", "message"),
    [
        ({"model_type": "idefics3"}, "a model of type 'idefics3'"),
        ({"vision_feature_layer": [-2, -1]}, r"of another shape: multi_modal_projector\.linear_1\.weight"),
        ({"image_token_index": 5}, "config.json has image token 5, but the tokenizer's <image> is"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_named(
    directory: Path, change_config: dict[str, object], message: str
) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change_config}))
    with pytest.raises(CheckpointError, match=message):
        load_model(directory, dtype=torch.float32)


def test_damaged_and_newer_descriptions_are_named(directory: Path) -> None:
    file = directory / "mmit.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match="format 99, newer than 1: update mmit"):
        load_model(directory, dtype=torch.float32)
    file.write_text("{")
    with pytest.raises(CheckpointError, match=r"mmit\.json is damaged"):
        load_model(directory, dtype=torch.float32)
    file.unlink()
    (directory / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"lacks preprocessor_config\.json"):
        load_model(directory, dtype=torch.float32)


def test_a_connector_that_is_set_otherwise_is_refused_although_every_shape_fits(
    sections: dict[str, ComposedModel], tmp_path: Path
) -> None:
    perceiver = {"type": "perceiver_resampler", "tokens": 3, "depth": 1, "heads": 2, "head_width": 4}
    content = sections["clip_llama"].model_dump() | {"connector": perceiver}
    save_model(composed(content), None, tmp_path / "two-heads", made_from={})
    other = composed(content | {"connector": perceiver | {"heads": 4, "head_width": 2}})
    with pytest.raises(CheckpointError, match="another connector than the run file: heads 2, here 4; head_width 4"):
        load_weights(other.model, tmp_path / "two-heads", connector=other.connector)


def composed(content: dict) -> LoadedModel:
    return build_model(ComposedModel.model_validate(content), dtype=torch.float32, seed=0)
