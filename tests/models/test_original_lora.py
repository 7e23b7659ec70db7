"""LoRA directories of LLaVA's original code: folded into the base they were trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from original_factories import Parts, Tensors, make_parts, opened, original_config, write_original

from mmit.errors import CheckpointError


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return make_parts(tmp_path_factory.mktemp("original"))


LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}


def write_lora(parts: Parts, directory: Path, **changes: Any) -> tuple[Path, Tensors]:
    """An adapter of rank 2 with ``non_lora_trainables.bin``, and the deltas that it amounts to: 3 B A."""
    generator = torch.Generator().manual_seed(0)
    adapter, deltas = {}, {}
    for name in ("model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"):
        out, width = parts.language[f"{name}.weight"].shape
        a, b = torch.randn(2, width, generator=generator), torch.randn(out, 2, generator=generator)
        adapter[f"base_model.model.{name}.lora_A.weight"] = a
        adapter[f"base_model.model.{name}.lora_B.weight"] = b
        deltas[f"language_model.{name}.weight"] = 3.0 * b @ a
    trained = {f"base_model.model.{name}": tensor for name, tensor in parts.projector.items()}
    files = {"adapter_model.bin": adapter, "non_lora_trainables.bin": trained}
    write_original(directory, original_config(parts.llm, parts.tower), files, parts.llm)
    (directory / "adapter_config.json").write_text(json.dumps({**LORA, **changes}))
    return directory, deltas


def test_lora_is_folded_into_its_base(parts: Parts, tmp_path: Path) -> None:
    directory, deltas = write_lora(parts, tmp_path / "lora", base_model_name_or_path=str(parts.llm))
    state = opened(directory).model.state_dict()  # the base is named by the adapter, and lies on this machine
    for name, tensor in parts.composed.model.state_dict().items():
        expected = tensor + deltas[name] if name in deltas else tensor
        torch.testing.assert_close(state[name], expected, rtol=0, atol=4e-6)  # roundings of fp32 sums up to 20
    assert len(deltas) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora: DoRA cannot be folded in"),
        ({"peft_type": "IA3"}, "holds an adapter of type IA3; LoRA can be read"),
    ],
)
def test_another_adapter_is_refused(parts: Parts, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    directory, _ = write_lora(parts, tmp_path / "lora", **changes)
    with pytest.raises(CheckpointError, match=message):
        opened(directory, base=str(parts.llm))


def test_an_adapter_of_another_base_is_refused(parts: Parts, tmp_path: Path) -> None:
    directory, _ = write_lora(parts, tmp_path / "lora")
    file = directory / "adapter_model.bin"
    torch.save({name: tensor[:, :1] if "_A" in name else tensor for name, tensor in torch.load(file).items()}, file)
    with pytest.raises(
        CheckpointError, match=r"the adapter of language_model.* makes \[.*give the model it was trained"
    ):
        opened(directory, base=str(parts.llm))
