"""What every connector must pass, built in or one's own: ``check_connector``.

Run it on a class of one's own before a training run does, with the sizes of a toy::

    check_connector({"type": "my_package:MyConnector"}, width_in=24, width_out=32, patches=16)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import safetensors.torch
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.nn import functional

from mmit.config import Connector as ConnectorSection
from mmit.errors import ConfigError
from mmit.models.connectors.build import build_connector
from mmit.models.connectors.interface import Connector, idle_parameters, reads_instruction

_TILES, _WORDS = 3, 5


def check_connector(
    section: ConnectorSection | Mapping[str, Any], *, width_in: int = 24, width_out: int = 32, patches: int = 16
) -> None:
    """Raise ConfigError, naming the first rule that it breaks, for a connector that training could not rely on.

    Its start depends on the seed alone; ``tokens(P)`` tokens of the promised width come out, in the dtype that went in;
    a tile's tokens depend on that tile alone; a gradient reaches its input and every parameter; a question, where
    it reads one, counts and its padding does not; its state can be stored and read back; two steps of training lower a
    loss.
    """
    described = TypeAdapter(ConnectorSection).validate_python(section)

    def make(seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
        return build_connector(
            described, width_in=width_in, width_out=width_out, patches=patches, seed=seed, dtype=dtype
        ).eval()

    generator = torch.Generator().manual_seed(0)
    tiles = torch.randn((_TILES, patches, width_in), generator=generator)
    _check_start(make)
    connector = make(0)
    words = _words(generator) if reads_instruction(connector) else ()
    for dtype in (torch.float32, torch.bfloat16):
        _check_output(make(0, dtype), tiles.to(dtype), words, width_out)
    _check_tiles_apart(connector, tiles, words)
    _check_gradients(connector, tiles, words)
    if words:
        _check_reads(connector, tiles, words)
    _check_state(connector, make(1), tiles, words)
    _check_learns(connector, tiles, words)


def _words(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids and mask (N, L) of questions of different lengths."""
    ids = torch.randint(1, 10, (_TILES, _WORDS), generator=generator)
    lengths = torch.arange(_TILES)[:, None] + _WORDS - _TILES + 1
    mask = torch.arange(_WORDS) < lengths
    return ids * mask, mask.long()


def _check_start(make: Callable[[int], nn.Module]) -> None:
    before = torch.get_rng_state()
    first, again, other = (dict(make(seed).named_parameters()) for seed in (7, 7, 8))
    _require(torch.equal(before, torch.get_rng_state()), "building it changes the global random state")
    same = all(torch.equal(first[name], again[name]) for name in first)
    _require(same, "built twice with one seed its weights differ: draw them from torch's default generator")
    differs = any(not torch.equal(first[name], other[name]) for name in first)
    _require(differs or not first, "built with another seed its weights are the same")


@torch.no_grad()
def _check_output(connector: nn.Module, tiles: Tensor, words: tuple[Tensor, ...], width_out: int) -> None:
    assert isinstance(connector, Connector), "build_connector checks it"
    found = connector(tiles, *words)
    promised = (tiles.shape[0], connector.tokens(tiles.shape[1]), width_out)
    _require(tuple(found.shape) == promised, f"it gives {tuple(found.shape)} where {promised} is promised")
    _require(found.dtype == tiles.dtype, f"it gives {found.dtype} for {tiles.dtype}")
    _require(torch.equal(found, connector(tiles, *words)), "the same tiles give other tokens the second time")
    blank = connector(torch.zeros_like(tiles), *words)
    _require(bool(blank.isfinite().all()), "a tile of zeros, which stands in for no image, gives no finite tokens")


@torch.no_grad()
def _check_tiles_apart(connector: nn.Module, tiles: Tensor, words: tuple[Tensor, ...]) -> None:
    together = connector(tiles, *words)
    for number in range(tiles.shape[0]):
        own = slice(number, number + 1)
        alone = connector(tiles[own], *(tensor[own] for tensor in words))
        # matrix products of other sizes add in another order: 1e-4 in fp32 is far above that and far below a leak
        apart = torch.allclose(alone, together[own], rtol=1e-4, atol=1e-4)
        _require(apart, "a tile's tokens are others when it comes with other tiles (batch statistics?)")


def _check_gradients(connector: nn.Module, tiles: Tensor, words: tuple[Tensor, ...]) -> None:
    tiles = tiles.clone().requires_grad_()
    connector.zero_grad()
    _loss(connector(tiles, *words)).backward()
    _require(tiles.grad is not None and bool(tiles.grad.any()), "no gradient reaches its input")
    idle = idle_parameters(connector)
    reached = {name for name, p in connector.named_parameters() if p.grad is not None and bool(p.grad.any())}
    missed = sorted({name for name, _ in connector.named_parameters()} - reached - idle)
    _require(
        not missed, f"no gradient reaches {', '.join(missed[:5])}; leave out what does nothing, or name it in idle"
    )
    _require(not idle & reached, f"a gradient reaches {', '.join(sorted(idle & reached)[:5])}, named in idle")


@torch.no_grad()
def _check_reads(connector: nn.Module, tiles: Tensor, words: tuple[Tensor, ...]) -> None:
    ids, mask = words
    found = connector(tiles, ids, mask)
    other = connector(tiles, ids.flip(0), mask.flip(0))
    _require(not torch.allclose(found, other), "another question gives the same tokens")
    longer = (functional.pad(ids, (0, 3)), functional.pad(mask, (0, 3)))
    same = torch.allclose(found, connector(tiles, *longer), rtol=1e-4, atol=1e-4)
    _require(same, "padding behind a question changes the tokens: heed the mask")


@torch.no_grad()
def _check_state(connector: nn.Module, other: nn.Module, tiles: Tensor, words: tuple[Tensor, ...]) -> None:
    try:
        stored = safetensors.torch.save(connector.state_dict())
    except RuntimeError as error:
        raise ConfigError(f"model.connector: its state cannot be stored: {error}") from error
    other.load_state_dict(safetensors.torch.load(stored))
    same = torch.equal(connector(tiles, *words), other(tiles, *words))
    _require(same, "stored and read back it gives other tokens: keep all that it needs in parameters and buffers")


def _check_learns(connector: nn.Module, tiles: Tensor, words: tuple[Tensor, ...]) -> None:
    optimizer = torch.optim.Adam(connector.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = _loss(connector(tiles, *words))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    _require(losses[-1] < losses[0], f"two steps of training lead from a loss of {losses[0]:.4g} to {losses[-1]:.4g}")


def _loss(tokens: Tensor) -> Tensor:
    target = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))
    return functional.mse_loss(tokens, target)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ConfigError(f"model.connector: {otherwise}")
