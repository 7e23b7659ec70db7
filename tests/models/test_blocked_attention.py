"""Packed attention, in blocks and by kernels, is torch's attention of each sample alone, in numbers and gradients.

fp32 sums in another order: 1e-5 is some hundred times the rounding of numbers near 1; bf16 rounds those to 1/256. The
gradients of a double are held against finite differences by ``gradcheck``.
"""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mmit.models import attention, blocked_attention
from mmit.models.attention import boundaries, packed_attention
from mmit.models.blocked_attention import BLOCK, KEPT

HEADS, KEY_HEADS, WIDTH = 4, 2, 8


def draw(tokens: int, *, rows: int = 1, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries, keys and values as a layer makes them: heads side by side in memory."""
    torch.manual_seed(tokens)
    return [
        torch.randn(rows, tokens, heads, WIDTH, dtype=dtype).transpose(1, 2).requires_grad_()
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


def attend(states: list[Tensor], samples: list[list[int]], *, dropout: float = 0.0) -> Tensor:
    query, key, value = states
    told = torch.tensor(samples)[None, None]
    return packed_attention(torch.nn.Module(), query, key, value, told, dropout=dropout)[0]


def sample_by_sample(states: list[Tensor], samples: list[list[int]]) -> Tensor:
    """Each sample alone by torch's attention, the shared tokens in front where there are any."""
    query, key, value = states
    prefix = samples[0][1]
    out = []
    for row, start, end, shared in [*[[0, 0, prefix, 0]][: prefix > 0], *samples]:
        q, k, v = (
            torch.cat([part[row : row + 1, :, :shared], part[row : row + 1, :, start:end]], dim=2)
            for part in (query, key, value)
        )
        both = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out.append(both[:, :, shared:].transpose(1, 2))
    rows = len(query)
    return torch.cat(out, dim=1).view(rows, -1, HEADS, WIDTH)


def compare(samples: list[list[int]], *, rows: int = 1) -> None:
    """Outputs and gradients of all routes, to which every sample adds with other weights."""
    exact = draw(samples[-1][2], rows=rows)
    expected = sample_by_sample(exact, samples)
    into = torch.randn(expected.shape)
    wanted = torch.autograd.grad(expected, exact, into)
    for blocks, dtype, allowed in ROUTES:
        states = [one.detach().to(dtype).requires_grad_() for one in exact]
        with patch.object(attention, "serves", lambda *_, blocks=blocks: blocks):
            found = attend(states, samples)
        got = torch.autograd.grad(found, states, into.to(dtype))
        for one, other in zip([found, *got], [expected, *wanted], strict=True):
            torch.testing.assert_close(one.float(), other, atol=allowed, rtol=allowed)


ROUTES = ((True, torch.float32, 1e-5), (False, torch.float32, 1e-5), (False, torch.bfloat16, 1e-1))


def in_a_row(lengths: list[int], *, prefix: int = 0, sharers: list[bool] | None = None) -> list[list[int]]:
    samples, start = list[list[int]](), prefix
    for number, length in enumerate(lengths):
        shared = prefix if sharers is None or sharers[number] else 0
        samples.append([0, start, start + length, shared])
        start += length
    return samples


def test_samples_of_all_lengths_are_attended_as_alone() -> None:
    """One token, one block and a little more, kept weights and (beyond 8 tokens per width) weights computed again."""
    assert KEPT * WIDTH == BLOCK == 64
    compare(in_a_row([1, 2, 63, 64, 65, 100, 1, 200]))


def test_rows_do_not_mix() -> None:
    positions = torch.cat([torch.arange(70), torch.arange(30), torch.arange(100)]).view(2, 100)
    compare(boundaries(positions)[0, 0].tolist(), rows=2)


@given(
    st.lists(st.tuples(st.integers(1, 90), st.booleans()), min_size=1, max_size=5),
    st.integers(1, 20),
)
def test_a_shared_prefix_is_seen_by_its_sharers_only(samples: list[tuple[int, bool]], prefix: int) -> None:
    lengths, sharers = [length for length, _ in samples], [sharer for _, sharer in samples]
    assume(any(sharers))
    compare(in_a_row(lengths, prefix=prefix, sharers=sharers))


@pytest.mark.parametrize("kept", [0, KEPT])
def test_gradients_are_those_of_finite_differences(monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    monkeypatch.setattr(blocked_attention, "BLOCK", 3)
    monkeypatch.setattr(blocked_attention, "KEPT", kept)
    states = draw(15, dtype=torch.float64)
    samples = in_a_row([1, 7, 5], prefix=2, sharers=[True, False, True])

    def blocked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return blocked_attention.blocked_attention(query, key, value, samples, 0.3)

    assert torch.autograd.gradcheck(blocked, states, fast_mode=True)


@pytest.mark.parametrize("worthwhile", [0, 10**9])
def test_nothing_of_one_sample_reaches_another(monkeypatch: pytest.MonkeyPatch, worthwhile: int) -> None:
    """NaN in one sample: neither its neighbours' outputs nor their gradients have any."""
    monkeypatch.setattr(blocked_attention, "WORTHWHILE", worthwhile)
    sound, samples = draw(120), in_a_row([40, 40, 40])
    poisoned = [states.detach().clone() for states in sound]
    for states in poisoned:
        states[:, :, 40:80] = float("nan")
        states.requires_grad_()
    found, clean = attend(poisoned, samples), attend(sound, samples)
    others = torch.cat([torch.arange(40), torch.arange(80, 120)])
    assert found[:, others].equal(clean[:, others])
    found[:, others].sum().backward()
    clean[:, others].sum().backward()
    for one, other in zip(poisoned, sound, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert one.grad[:, :, others].equal(other.grad[:, :, others])


LONG, SHORT = in_a_row([160, 160]), in_a_row([150, 160])
"""4 x 160 x 160 scores are more than 100,000; with 150 tokens the mean is less."""


@pytest.mark.parametrize(
    ("samples", "dtype", "dropout", "blocks"),
    [
        (LONG, torch.float32, 0.0, True),
        (SHORT, torch.float32, 0.0, False),
        (LONG, torch.bfloat16, 0.0, False),
        (LONG, torch.float32, 0.1, False),
    ],
)
def test_what_blocks_do_not_serve_stays_with_torch(
    monkeypatch: pytest.MonkeyPatch, samples: list[list[int]], dtype: torch.dtype, dropout: float, *, blocks: bool
) -> None:
    called = list[tuple[torch.dtype, float]]()

    def noted(query: Tensor, key: Tensor, value: Tensor, *, dropout_p: float, enable_gqa: bool, **_: object) -> Tensor:
        called.append((query.dtype, dropout_p))
        return scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, enable_gqa=enable_gqa)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", noted)
    attend(draw(samples[-1][2], dtype=dtype), samples, dropout=dropout)
    assert called == ([] if blocks else [(dtype, dropout)] * 2)


def test_weights_are_kept_for_the_backward_pass_only(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = list[torch.Size]()

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.shape)
        return tensor

    monkeypatch.setattr(blocked_attention, "WORTHWHILE", 0)
    states, samples = draw(100), in_a_row([40, 60])
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with torch.no_grad():
            attend(states, samples)
        assert not saved
        attend(states, samples)
    assert {(HEADS, 40, 40), (HEADS, 60, 60)} <= set(map(tuple, saved))
