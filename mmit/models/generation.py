"""Answers from input embeddings, through the language model's own ``generate`` and key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from mmit.errors import ConfigError

COLDEST = 1e-5
"""Temperatures below are greedy: logits divided by less leave fp32."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How ids are chosen. temperature 0 (or below COLDEST) is greedy; ``stop_ids`` end an answer and are not in it.

    never: ids that are not chosen. synced: every rank answers a prompt now, and makes as many forward passes as the one
    with the longest answer, which partitioned weights need.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    stop_ids: tuple[int, ...]
    never: tuple[int, ...] = ()
    synced: bool = False


def answers(
    language_model: PreTrainedModel,
    prompts: Sequence[Tensor],
    sampling: Sampling,
    *,
    on_token: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """One answer per prompt of embeddings (T, D); shorter prompts are padded on the left and masked.

    on_token: called with each id as it is made (one prompt only). Raises ConfigError for a model without ``generate``.
    """
    if not isinstance(language_model, GenerationMixin):
        raise ConfigError(f"{type(language_model).__name__} cannot generate text in transformers")
    length = max(prompt.shape[0] for prompt in prompts)
    embeddings = prompts[0].new_zeros((len(prompts), length, prompts[0].shape[1]))  # (B, T, D)
    mask = torch.zeros((len(prompts), length), dtype=torch.int64, device=embeddings.device)
    for row, prompt in enumerate(prompts):
        embeddings[row, length - prompt.shape[0] :] = prompt
        mask[row, length - prompt.shape[0] :] = 1
    stop = list(sampling.stop_ids)
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampling.temperature > COLDEST,
        eos_token_id=stop or None,
        pad_token_id=stop[0] if stop else 0,
        suppress_tokens=list(sampling.never) or None,
    )
    if sampling.temperature > COLDEST:
        config.temperature, config.top_p, config.top_k = sampling.temperature, sampling.top_p, 0
    streamer = None if on_token is None else _Streamer(on_token, frozenset(stop))
    made = language_model.generate(
        inputs_embeds=embeddings,
        attention_mask=mask,
        generation_config=config,
        streamer=streamer,
        synced_gpus=sampling.synced,
    )
    return [_until_stop(row.tolist(), frozenset(stop)) for row in made]


class _Streamer(BaseStreamer):
    """Hands each new id on; the first call of transformers brings the (empty) prompt."""

    def __init__(self, on_token: Callable[[int], None], stop: frozenset[int]) -> None:
        self.on_token = on_token
        self.stop = stop

    def put(self, value: Tensor) -> None:
        for token in value.view(-1).tolist():
            if token not in self.stop:
                self.on_token(token)

    def end(self) -> None:
        pass


def _until_stop(ids: list[int], stop: frozenset[int]) -> list[int]:
    """Everything before the first stop id; what follows it in a batch is padding."""
    for place, token in enumerate(ids):
        if token in stop:
            return ids[:place]
    return ids
