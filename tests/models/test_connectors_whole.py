"""Every connector inside a whole model: stored and read back to the bit, trained, known to the outline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models_support import batch_of, sample
from torch import Tensor, nn

from mmit.config import ComposedModel, WholeModel
from mmit.errors import ConfigError
from mmit.models import LoadedModel, build_model, load_model, read_outline, save_model
from mmit.models.encoders import ImageInput

KINDS: list[dict[str, Any]] = [
    {"type": "linear"},
    {"type": "mlp", "depth": 3},
    {"type": "pixel_shuffle"},
    {"type": "average_pool", "tokens": 1},
    {"type": "c_abstractor", "tokens": 4, "hidden": 8, "blocks": 1},
    {"type": "perceiver_resampler", "tokens": 3, "depth": 1, "heads": 2, "head_width": 4},
    {"type": "qformer", "tokens": 3, "hidden": 16, "depth": 2, "heads": 2, "intermediate": 32},
]
TOKENS = {"linear": 4, "mlp": 4, "pixel_shuffle": 1, "average_pool": 1, "c_abstractor": 4}
TOKENS |= {"perceiver_resampler": 3, "qformer": 3}


def loss(loaded: LoadedModel) -> Tensor:
    rows = [
        [sample(loaded, text=range(40, 48), images=2, trained=4)],
        [sample(loaded, text=range(50, 54), images=0, trained=2)],
    ]
    return loaded.model(batch_of(loaded, rows))


@pytest.mark.parametrize("described", KINDS, ids=lambda described: described["type"])
def test_a_model_with_any_connector_trains_and_is_read_back_to_the_bit(
    described: dict[str, Any], sections: dict[str, ComposedModel], tmp_path: Path
) -> None:
    section = ComposedModel.model_validate(sections["clip_llama"].model_dump() | {"connector": described})
    loaded = build_model(section, dtype=torch.float32, seed=3)
    assert loaded.spec.tokens_per_tile == read_outline(section).spec.tokens_per_tile == TOKENS[described["type"]]
    (group,) = loaded.model.train_only({"connector": 1e-3})
    optimizer = torch.optim.Adam([p for p in loaded.model.parameters() if p.requires_grad], lr=1e-2)
    seen = []
    for _ in range(3):
        found = loss(loaded)
        seen.append(found.item())
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
    assert seen[2] < seen[0]
    reached = {name for name, p in loaded.model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert reached == set(group.names)
    save_model(loaded, None, tmp_path / "model", made_from={})
    again = load_model(tmp_path / "model", dtype=torch.float32)
    state = again.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in loaded.model.state_dict().items())
    assert torch.equal(loss(again), loss(loaded))
    assert read_outline(WholeModel(path=str(tmp_path / "model"))).spec == loaded.spec
    reason = json.loads((tmp_path / "model" / "mmit.json").read_text()).get("not_llava_because", "")
    assert "its projector has exactly two linear layers, this connector is" in reason


class Wide(nn.Module):
    """Pictures of 56 x 14 pixels: four patches beside each other, which are a square number and no square."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.patches = 24, 4
        self.image = ImageInput(size=(14, 56), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        self.cut = nn.Conv2d(3, 24, 14, 14)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.cut(pixels).flatten(2).transpose(1, 2)


def test_a_strip_of_patches_is_not_taken_for_a_square(sections: dict[str, ComposedModel]) -> None:
    content = sections["clip_llama"].model_dump() | {"encoder": {"type": f"{__name__}:Wide"}}
    assert build_model(ComposedModel.model_validate(content), dtype=torch.float32, seed=3).spec.tokens_per_tile == 4
    section = ComposedModel.model_validate(content | {"connector": {"type": "pixel_shuffle"}})
    with pytest.raises(ConfigError, match=r"PixelShuffleProjector needs a square grid .* pictures of 56 x 14 pixels"):
        build_model(section, dtype=torch.float32, seed=3)
