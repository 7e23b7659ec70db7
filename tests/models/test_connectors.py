"""Connectors: one suite that all of them pass, names, refusals before anything runs, a connector of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from factories import tiny_bert_tokenizer
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from mmit.config import Connector as Section
from mmit.config import LinearConnector, MlpConnector
from mmit.errors import ConfigError
from mmit.models.connectors import Connector, build_connector, check_connector, keeps_grid, reads_instruction

KINDS: dict[str, dict[str, Any]] = {
    "linear": {},
    "mlp": {"depth": 3},
    "pixel_shuffle": {"factor": 2},
    "average_pool": {"tokens": 9},
    "c_abstractor": {"tokens": 4, "hidden": 16, "blocks": 2},
    "perceiver_resampler": {"tokens": 5, "depth": 2, "heads": 2, "head_width": 8},
    "qformer": {"tokens": 6, "hidden": 16, "depth": 3, "heads": 2, "intermediate": 32},
}
TOKENS = {"linear": 16, "mlp": 16, "pixel_shuffle": 4, "average_pool": 9, "c_abstractor": 4}
TOKENS |= {"perceiver_resampler": 5, "qformer": 6}


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


class TwoForOne(MeanConnector):
    def tokens(self, patches: int) -> int:
        return 2


class Idle(MeanConnector):
    def __init__(self, *, width_in: int, width_out: int) -> None:
        super().__init__(width_in=width_in, width_out=width_out)
        self.nobody = nn.Parameter(torch.randn(3))


class BatchNormed(MeanConnector):
    def forward(self, patches: Tensor) -> Tensor:
        return super().forward(patches - patches.mean(dim=0))


class InFullPrecision(MeanConnector):
    def forward(self, patches: Tensor) -> Tensor:
        return super().forward(patches).float()


class Unseeded(MeanConnector):
    def __init__(self, *, width_in: int, width_out: int) -> None:
        super().__init__(width_in=width_in, width_out=width_out)
        nn.init.normal_(self.map.weight, generator=torch.Generator().manual_seed(torch.seed() % 2**31))


class Forgetful(MeanConnector):
    def __init__(self, *, width_in: int, width_out: int) -> None:
        super().__init__(width_in=width_in, width_out=width_out)
        self.scale = torch.rand(1)

    def forward(self, patches: Tensor) -> Tensor:
        return super().forward(patches * self.scale.to(patches.dtype))


def section(kind: str, **keys: Any) -> Any:
    return TypeAdapter(Section).validate_python({"type": kind, **keys})


def built(kind: str, *, patches: int = 16, seed: int = 0, **keys: Any) -> nn.Module:
    described = section(kind, **keys)
    return build_connector(described, width_in=6, width_out=4, patches=patches, seed=seed, dtype=torch.float32)


def own(connector: type[nn.Module]) -> str:
    return f"{__name__}:{connector.__name__}"


@pytest.mark.parametrize("kind", [*KINDS, own(MeanConnector)])
def test_every_connector_passes_the_suite(kind: str) -> None:
    check_connector({"type": kind, **KINDS.get(kind, {})}, width_in=24, width_out=32, patches=16)


def test_a_qformer_that_reads_the_question_passes_the_suite_too(tmp_path: Path) -> None:
    tiny_bert_tokenizer(tmp_path)
    instruction = {"tokenizer": str(tmp_path), "length": 8, "positions": 16}
    check_connector({"type": "qformer", **KINDS["qformer"], "instruction": instruction})


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_tokens_is_known_beforehand(kind: str) -> None:
    connector = built(kind, **KINDS[kind])
    assert isinstance(connector, Connector)
    assert connector.tokens(16) == TOKENS[kind]
    assert keeps_grid(connector) == (kind not in ("perceiver_resampler", "qformer"))
    assert not reads_instruction(connector)


@pytest.mark.parametrize(
    ("connector", "broken"),
    [
        (TwoForOne, r"gives \(3, 1, 32\) where \(3, 2, 32\) is promised"),
        (Idle, "no gradient reaches nobody"),
        (BatchNormed, "a tile's tokens are others when it comes with other tiles"),
        (InFullPrecision, "gives torch.float32 for torch.bfloat16"),
        (Unseeded, "built twice with one seed its weights differ"),
        (Forgetful, "stored and read back it gives other tokens"),
    ],
)
def test_the_suite_names_the_rule_that_is_broken(connector: type[nn.Module], broken: str) -> None:
    with torch.random.fork_rng(), pytest.raises(ConfigError, match=broken):
        check_connector({"type": own(connector)})


@pytest.mark.parametrize(
    ("made", "names"),
    [
        (LinearConnector(type="linear"), ["linear_1"]),
        (MlpConnector(depth=2), ["linear_1", "linear_2"]),
        (MlpConnector(depth=4), ["linear_1", "linear_2", "linear_3", "linear_4"]),
    ],
)
def test_the_layers_of_an_mlp_are_named_as_in_transformers(made: Any, names: list[str]) -> None:
    connector = build_connector(made, width_in=6, width_out=4, patches=5, seed=0, dtype=torch.float32)
    assert [name for name, _ in connector.named_children()] == names


@pytest.mark.parametrize(
    ("kind", "keys", "patches", "sentence"),
    [
        (
            "pixel_shuffle",
            {},
            577,
            "pixel_shuffle needs a square grid of patches, the encoder gives 577; set .*cls to drop",
        ),
        ("pixel_shuffle", {}, 25, "squares of 2 x 2 patches, which do not cut a grid of 5 x 5; choose a factor that"),
        ("average_pool", {"tokens": 4}, 12, "average_pool needs a square grid of patches, the encoder gives 12$"),
        ("average_pool", {"tokens": 25}, 16, "average_pool cannot make 25 tokens of 16 patches; take at most 16"),
        ("c_abstractor", KINDS["c_abstractor"], 17, "c_abstractor needs a square grid .*cls to drop"),
    ],
)
def test_patches_that_do_not_fit_are_refused_when_the_model_is_built(
    kind: str, keys: dict[str, Any], patches: int, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        built(kind, patches=patches, **keys)


def test_a_number_of_tokens_that_is_no_square_is_refused_in_the_run_file() -> None:
    with pytest.raises(ValidationError, match="143 is no square number, such as 121 or 144"):
        section("average_pool", tokens=143)


def test_a_connector_of_other_widths_is_an_error() -> None:
    with pytest.raises(ConfigError, match="maps 6 to 5, but the encoder gives 6 and the language model takes 4"):
        built(own(MeanConnector), args={"width_out": 5})


def test_a_module_without_the_interface_is_an_error() -> None:
    with pytest.raises(ConfigError, match="Identity lacks one of 'width_in', 'width_out' and 'tokens"):
        built("torch.nn:Identity")
