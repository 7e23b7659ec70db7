"""Connectors against independent implementations: numbers by hand, loops, transformers, plain products."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.nn import functional
from transformers import InternVLConfig, InternVLModel

from mmit.config import Connector as Section
from mmit.models.connectors import build_connector
from mmit.models.connectors.grid import average
from mmit.models.connectors.pixel_shuffle import pixel_shuffle

WIDTH_IN, WIDTH_OUT, SIDE = 12, 8, 4


def built(kind: str, **keys: Any) -> nn.Module:
    section = TypeAdapter(Section).validate_python({"type": kind, **keys})
    made = build_connector(
        section, width_in=WIDTH_IN, width_out=WIDTH_OUT, patches=SIDE**2, seed=5, dtype=torch.float32
    )
    for name, parameter in made.named_parameters():  # no weight or bias that could go missing unseen
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        parameter.data += 0.1 * noise
    return made


def patches(seed: int = 0) -> Tensor:
    return torch.randn((2, SIDE**2, WIDTH_IN), generator=torch.Generator().manual_seed(seed))


def test_the_mlp_is_linear_gelu_linear() -> None:
    connector = built("mlp", depth=2)
    one, two = connector.get_submodule("linear_1"), connector.get_submodule("linear_2")
    assert torch.equal(connector(patches()), two(functional.gelu(one(patches()))))


def test_pixel_shuffle_puts_the_four_patches_of_a_square_side_by_side_row_by_row() -> None:
    #  0  1 |  2  3
    #  4  5 |  6  7
    # ------+------
    #  8  9 | 10 11
    # 12 13 | 14 15
    numbered = torch.arange(16.0).view(1, 16, 1)
    assert pixel_shuffle(numbered, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_pixel_shuffle_is_that_of_internvl_in_transformers() -> None:
    grid = patches().unflatten(1, (SIDE, SIDE))
    config = InternVLConfig()
    reference = InternVLModel.pixel_shuffle(nn.Module(), grid, scale_factor=config.downsample_ratio)  # ty: ignore

    assert torch.equal(pixel_shuffle(patches(), 2), reference.flatten(1, 2))


def test_pixel_shuffle_goes_through_a_norm_and_an_mlp() -> None:
    connector = built("pixel_shuffle", factor=2)
    norm, one, two = (connector.get_submodule(name) for name in ("norm", "mlp.linear_1", "mlp.linear_2"))
    merged = functional.layer_norm(pixel_shuffle(patches(), 2), (4 * WIDTH_IN,), norm.weight, norm.bias)  # ty: ignore
    assert torch.equal(connector(patches()), two(functional.gelu(one(merged))))


def test_the_average_of_four_numbers_is_their_sum_by_four() -> None:
    numbered = torch.arange(16.0).view(1, 4, 4, 1)
    assert average(numbered, 2)[0, :, :, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    assert average(numbered, 4).equal(numbered)


def test_regions_that_do_not_divide_the_grid_are_those_of_adaptive_pooling() -> None:
    grid = torch.randn((2, 24, 24, 3), generator=torch.Generator().manual_seed(0))
    for side in (1, 5, 7, 12, 23):
        pooled = functional.adaptive_avg_pool2d(grid.permute(0, 3, 1, 2), side).permute(0, 2, 3, 1)
        # sums of up to 576 numbers of size 1, in another order
        torch.testing.assert_close(average(grid, side), pooled, rtol=0, atol=1e-6)


def test_the_average_pool_is_the_mlp_of_the_averages() -> None:
    connector = built("average_pool", tokens=4, depth=1)
    squares = patches().unflatten(1, (2, 2, 2, 2)).mean(dim=(2, 4)).flatten(1, 2)
    expected = connector.get_submodule("mlp.linear_1")(squares)
    torch.testing.assert_close(connector(patches()), expected, rtol=0, atol=1e-6)


def test_the_perceiver_is_attention_of_latents_to_patches_and_latents_written_out() -> None:
    heads, width = 2, 5
    connector = built("perceiver_resampler", tokens=3, depth=2, heads=heads, head_width=width)
    w = dict(connector.named_parameters())

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (var + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["latents"].expand(2, -1, -1)
    for layer in ("layers.0", "layers.1"):
        latents = norm(x, f"{layer}.0.norm_latents")
        media = torch.cat([norm(patches(), f"{layer}.0.norm_media"), latents], dim=1)
        q = (latents @ w[f"{layer}.0.to_q.weight"].T).view(2, 3, heads, width)
        kv = (media @ w[f"{layer}.0.to_kv.weight"].T).view(2, SIDE**2 + 3, 2, heads, width)
        scores = torch.einsum("nqhd,nkhd->nhqk", q, kv[:, :, 0]) / width**0.5
        found = torch.einsum("nhqk,nkhd->nqhd", scores.softmax(-1), kv[:, :, 1]).flatten(2)
        x = x + found @ w[f"{layer}.0.to_out.weight"].T
        hidden = norm(x, f"{layer}.1.0") @ w[f"{layer}.1.1.weight"].T
        x = x + functional.gelu(hidden) @ w[f"{layer}.1.3.weight"].T
    expected = norm(x, "norm") @ w["projection.weight"].T + w["projection.bias"]
    # the same sums in another order, over 24 layers' worth of numbers below 10
    torch.testing.assert_close(connector(patches()), expected, rtol=0, atol=2e-5)


def test_the_c_abstractor_is_bottlenecks_with_a_gate_around_an_average_written_out() -> None:
    connector = built("c_abstractor", tokens=4, hidden=6, blocks=1)
    w = dict(connector.named_parameters())

    def layer(x: Tensor, name: str, *, groups: int = 1) -> Tensor:
        kernel = w[f"{name}.conv.weight"]
        x = functional.conv2d(x, kernel, padding=kernel.shape[-1] // 2, groups=groups)
        x = functional.layer_norm(x.permute(0, 2, 3, 1), (6,), w[f"{name}.bn.weight"], w[f"{name}.bn.bias"], 1e-5)
        return x.permute(0, 3, 1, 2)

    def block(x: Tensor, name: str) -> Tensor:
        y = functional.silu(layer(x, f"{name}.conv1"))
        y = functional.silu(layer(y, f"{name}.conv2", groups=6))
        gate = y.mean(dim=(2, 3), keepdim=True)
        gate = functional.silu(functional.conv2d(gate, w[f"{name}.se.fc1.weight"], w[f"{name}.se.fc1.bias"]))
        gate = functional.conv2d(gate, w[f"{name}.se.fc2.weight"], w[f"{name}.se.fc2.bias"]).sigmoid()
        y = layer(y * gate, f"{name}.conv3")
        return functional.silu(y + (layer(x, f"{name}.downsample") if f"{name}.downsample.conv.weight" in w else x))

    x = (patches() + w["pos_emb"]).transpose(1, 2).unflatten(2, (SIDE, SIDE))
    x = block(functional.adaptive_avg_pool2d(block(x, "net.0.b1"), 2), "net.2.b1")
    x = x.flatten(2).transpose(1, 2) @ w["readout.0.weight"].T + w["readout.0.bias"]
    expected = functional.silu(x) @ w["readout.2.weight"].T + w["readout.2.bias"]
    # the same operations; only the average adds in another order
    torch.testing.assert_close(connector(patches()), expected, rtol=0, atol=1e-5)
