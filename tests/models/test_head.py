"""The loss in chunks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from mmit.models import head as module
from mmit.models.head import labelled_nll


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_chunks_of_any_size_give_the_loss_and_gradients_of_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, chunk: int, bias: bool
) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk * 11)
    torch.manual_seed(0)
    head = nn.Linear(5, 11, bias=bias)
    hidden = torch.randn(7, 5, requires_grad=True)
    labels = torch.tensor([0, 10, 3, 3, 7, 1, 2])
    inputs = [hidden, *head.parameters()]
    loss = labelled_nll(head, hidden, labels)
    mine = torch.autograd.grad(loss * 0.25, inputs)
    expected = functional.cross_entropy(head(hidden), labels, reduction="sum")
    theirs = torch.autograd.grad(expected * 0.25, inputs)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    for gradient, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-6)


def test_a_frozen_head_passes_the_gradient_on_and_keeps_none() -> None:
    torch.manual_seed(0)
    head = nn.Linear(5, 11, bias=False).requires_grad_(False)
    hidden = torch.randn(4, 5, requires_grad=True)
    labelled_nll(head, hidden, torch.tensor([1, 2, 3, 4])).backward()
    assert head.weight.grad is None
    assert hidden.grad is not None
    assert float(hidden.grad.abs().max()) > 0


def test_bf16_loss_is_as_exact_as_its_logits() -> None:
    torch.manual_seed(0)
    head = nn.Linear(32, 64, bias=False).bfloat16()
    hidden = torch.randn(50, 32).bfloat16().requires_grad_()
    labels = torch.randint(0, 64, (50,))
    loss = labelled_nll(head, hidden, labels)
    logits = head(hidden).float()  # rounded to bf16 once, by the head; everything behind it is fp32
    expected = functional.cross_entropy(logits, labels, reduction="sum")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    assert head.weight.grad is not None
    assert head.weight.grad.dtype == torch.bfloat16


def test_the_head_is_called_once_and_is_itself_again_afterwards() -> None:
    head = nn.Linear(5, 11, bias=False)
    calls: list[int] = []
    head.register_forward_hook(lambda *_: calls.append(1))
    labelled_nll(head, torch.randn(6, 5), torch.zeros(6, dtype=torch.int64))
    assert calls == [1]
    assert head(torch.randn(6, 5)).shape == (6, 11)
    with pytest.raises(RuntimeError):  # a label out of range
        labelled_nll(head, torch.randn(1, 5), torch.tensor([11]))
    assert head(torch.randn(6, 5)).shape == (6, 11)
