"""Connectors: names, token counts, a start that depends on the seed alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mmit.config import CustomPart, LinearConnector, MlpConnector
from mmit.errors import ConfigError
from mmit.models.connectors import Connector, MlpProjector, build_connector

Section = LinearConnector | MlpConnector | CustomPart


def built(section: Section, *, seed: int = 0) -> nn.Module:
    return build_connector(section, width_in=6, width_out=4, seed=seed, dtype=torch.float32)


@pytest.mark.parametrize(
    ("section", "names"),
    [
        (LinearConnector(type="linear"), ["linear_1"]),
        (MlpConnector(depth=2), ["linear_1", "linear_2"]),
        (MlpConnector(depth=4), ["linear_1", "linear_2", "linear_3", "linear_4"]),
    ],
)
def test_layers_are_named_as_in_transformers_and_map_each_patch_to_a_token(section: Section, names: list[str]) -> None:
    connector = built(section)
    assert [name for name, _ in connector.named_children()] == names
    assert isinstance(connector, Connector)
    assert connector.tokens(576) == 576
    assert connector(torch.zeros(2, 5, 6)).shape == (2, 5, 4)


def test_the_mlp_is_linear_gelu_linear() -> None:
    connector = built(MlpConnector(depth=2))
    assert isinstance(connector, MlpProjector)
    one, two = connector.get_submodule("linear_1"), connector.get_submodule("linear_2")
    patches = torch.randn(1, 3, 6)
    assert torch.equal(connector(patches), two(functional.gelu(one(patches))))


def test_the_start_depends_on_the_seed_alone_and_leaves_the_global_state() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = built(MlpConnector(), seed=7).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    second = built(MlpConnector(), seed=7).state_dict()
    other = built(MlpConnector(), seed=8).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["linear_1.weight"], other["linear_1.weight"])


class MeanConnector(nn.Module):
    """All patches of a tile in one token."""

    def __init__(self, *, width_in: int, width_out: int) -> None:
        super().__init__()
        self.width_in, self.width_out = width_in, width_out
        self.map = nn.Linear(width_in, width_out)

    def tokens(self, patches: int) -> int:
        return 1

    def forward(self, patches: Tensor) -> Tensor:
        return self.map(patches.mean(dim=1, keepdim=True))


def test_a_connector_of_ones_own_learns_the_widths() -> None:
    connector = built(CustomPart(type=f"{__name__}:MeanConnector"))
    assert isinstance(connector, MeanConnector)
    assert connector(torch.zeros(2, 5, 6)).shape == (2, 1, 4)


def test_a_connector_of_other_widths_is_an_error() -> None:
    section = CustomPart(type=f"{__name__}:MeanConnector", args={"width_out": 5})
    with pytest.raises(ConfigError, match="maps 6 to 5, but the encoder gives 6 and the language model takes 4"):
        built(section)
