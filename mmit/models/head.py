"""The loss at the labelled positions, without the logits of all others and never with all of theirs at once.

The head is called exactly once per forward, through the module, on every rank: under ZeRO-3 its weight is gathered
in that call, and ranks that called it different numbers of times would wait for each other for ever.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from mmit.batch import IGNORE, Batch, BySource

CHUNK_ELEMENTS = 2**26
"""Logits that exist at a time: 256 MiB in fp32."""


class _ChunkedNll(torch.autograd.Function):
    """Sum of -log p over the labels of (S, D) hidden states; gradients are made in the forward pass, chunk by chunk.

    The logits of a chunk are dropped as soon as its gradient is known: what remains is the size of the inputs.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - torch passes them by position
        ctx: Any,  # noqa: ANN401 - torch's context takes any attribute
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        vocabulary: int,
        with_grad: bool,
        by_source: BySource | None,
    ) -> Tensor:
        wants = [with_grad and needed for needed in ctx.needs_input_grad[:3]]
        grad_hidden = torch.empty_like(hidden) if wants[0] else None
        grad_weight = torch.empty_like(weight) if wants[1] else None
        if grad_weight is not None:
            grad_weight[vocabulary:] = 0.0
        grad_bias = torch.zeros_like(bias) if wants[2] and bias is not None else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        used, bias_used = weight[:vocabulary], None if bias is None else bias[:vocabulary]
        rows = max(1, CHUNK_ELEMENTS // vocabulary)
        # one pass at least: without a label, the gradient of the weight is the product of nothing
        for start in range(0, max(1, hidden.shape[0]), rows):
            part, target = hidden[start : start + rows], labels[start : start + rows, None]
            logits = functional.linear(part, used, bias_used)  # (C, V)
            log_p = functional.log_softmax(logits, dim=1, dtype=torch.float32)
            nll = -log_p.gather(1, target)
            total += nll.sum()
            if by_source is not None:
                by_source.add(nll[:, 0], start)
            if not any(wants):
                continue
            # d(-log p)/d(logits) = softmax - onehot
            slope = log_p.exp_()
            slope.scatter_add_(1, target, torch.full_like(slope[:, :1], -1.0))
            slope = slope.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(slope, used, out=grad_hidden[start : start + rows])
            if grad_weight is not None:
                # beta 0: the first chunk writes, later ones add
                grad_weight[:vocabulary].addmm_(slope.t(), part, beta=int(start > 0))
            if grad_bias is not None:
                grad_bias[:vocabulary] += slope.sum(dim=0)
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        scaled = [None if gradient is None else gradient.mul_(grad) for gradient in ctx.gradients]
        ctx.gradients = ()
        return (*scaled, None, None, None, None)


def labelled_nll(
    head: nn.Linear, hidden: Tensor, labels: Tensor, by_source: BySource | None = None, *, vocabulary: int | None = None
) -> Tensor:
    """The fp32 sum of -log p of ``labels`` (S,) given the last hidden states (S, D); 0 with gradients 0 for S = 0.

    vocabulary: ids below it share the probability; None for all rows of the head.
    by_source: gets the sums of each source too. No further computation is needed for them.
    The head's forward is replaced for the length of one call: its weight may only be used inside it (ZeRO-3).
    """
    with_grad = torch.is_grad_enabled()

    def loss_instead_of_logits(states: Tensor) -> Tensor:
        weight, bias = head.weight, head.bias
        words = weight.shape[0] if vocabulary is None else min(vocabulary, weight.shape[0])
        return _ChunkedNll.apply(states, weight, bias, labels, words, with_grad, by_source)

    head.__dict__["forward"] = loss_instead_of_logits
    try:
        return head(hidden)
    finally:
        del head.__dict__["forward"]


def nll_by_own_forward(
    language_model: PreTrainedModel, embeddings: Tensor, batch: Batch, *, vocabulary: int | None, told: dict[str, Any]
) -> Tensor:
    """The loss where logits are more than head times hidden state: the model computes them, at labelled columns.

    embeddings: (B, T, D). told: what the attention is told about the samples.
    """
    columns = (batch.ids.labels != IGNORE).any(dim=0).nonzero().view(-1)
    logits = language_model(
        inputs_embeds=embeddings,
        position_ids=batch.position_ids,
        use_cache=False,
        **told,
        logits_to_keep=columns.to(embeddings.device, non_blocking=True),
    ).logits[..., :vocabulary]  # (B, C, V)
    labels = batch.ids.labels[:, columns].flatten()
    labelled = (labels != IGNORE).nonzero().view(-1).to(embeddings.device, non_blocking=True)
    labels = labels.to(embeddings.device, non_blocking=True)
    nll = functional.cross_entropy(logits.float().flatten(0, 1), labels, ignore_index=IGNORE, reduction="none")
    if batch.by_source is not None:
        batch.by_source.add(nll[labelled], 0)
    return nll.sum()


@torch.no_grad()
def head_is_plain(language_model: PreTrainedModel) -> bool:
    """True where the logits are the output layer applied to the last hidden state and nothing else.

    False for soft-capped (Gemma 2) or scaled (Cohere, Granite) logits and for a head of another kind: their loss goes
    through the model's own forward. Found out by running the model on one random embedding.
    """
    head = language_model.get_output_embeddings()
    if type(head) is not nn.Linear or language_model.base_model is language_model:
        return False
    seen: dict[str, Tensor] = {}

    def note_backbone(_module: nn.Module, _inputs: tuple[Tensor, ...], output: BaseModelOutput) -> None:
        if output.last_hidden_state is not None:
            seen["states"] = output.last_hidden_state

    def note_head(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen["input"], seen["output"] = inputs[0], output

    hooks = (
        language_model.base_model.register_forward_hook(note_backbone),
        head.register_forward_hook(note_head),
    )
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn((1, 1, head.in_features), generator=generator)
    try:
        logits = language_model(
            inputs_embeds=embeddings.to(head.weight.device, head.weight.dtype), use_cache=False
        ).logits
    finally:
        for hook in hooks:
            hook.remove()
    if seen.keys() != {"states", "input", "output"}:
        return False
    return torch.equal(seen["states"], seen["input"]) and torch.equal(seen["output"].float(), logits.float())
