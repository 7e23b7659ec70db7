"""Q-Formers out of transformers' own modules: BLIP-2's, and InstructBLIP's, which also reads the question.

Tensors are named as in transformers' BLIP-2 and InstructBLIP: ``query_tokens``, ``qformer.*``,
``language_projection.*``. BLIP-2: arXiv 2301.12597, sec. 3.1; InstructBLIP: arXiv 2305.06500, sec. 2.3.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel, InstructBlipQFormerConfig, InstructBlipQFormerModel


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a Q-Former, by the names of its configuration in transformers."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    cross_attention_frequency: int


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How questions are read: tokenizer (directory or hub name), most tokens of one, rows of the two tables."""

    tokenizer: str
    length: int
    vocabulary: int
    positions: int


class QFormer(nn.Module):
    """``count`` queries that attend to each other and, in some layers, to the patches; then one linear layer.

    reading: the queries also attend to the question of the tile's turn; None: to the picture alone. The text half of
    the last layer then does nothing and is kept for files only. dropout: while training.
    Starts as published: all weights from a normal of 0.02, also the queries (transformers would start all of them at
    zero, where they stay equal for ever), the last layer as torch starts it.
    """

    def __init__(
        self,
        *,
        width_in: int,
        width_out: int,
        count: int,
        shape: Shape,
        reading: Reading | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.width_in = width_in
        self.width_out = width_out
        self.count = count
        self.reads_instruction = reading is not None
        self.query_tokens = nn.Parameter(torch.empty(1, count, shape.hidden_size))
        nn.init.normal_(self.query_tokens, std=0.02)
        sizes: dict[str, Any] = {
            **asdict(shape),
            "encoder_hidden_size": width_in,
            "hidden_dropout_prob": dropout,
            "attention_probs_dropout_prob": dropout,
        }
        if reading is None:
            blind = Blip2QFormerConfig(**sizes, use_qformer_text_input=False)
            self.qformer: Blip2QFormerModel | InstructBlipQFormerModel = Blip2QFormerModel(blind)
        else:
            self.instruction_tokenizer = reading.tokenizer
            self.instruction_length = reading.length
            tables = {"vocab_size": reading.vocabulary, "max_position_embeddings": reading.positions}
            self.qformer = InstructBlipQFormerModel(InstructBlipQFormerConfig(**sizes, **tables))
            last = f"qformer.encoder.layer.{shape.num_hidden_layers - 1}."
            text = (f"{last}intermediate.", f"{last}output.")
            self.idle = frozenset(name for name, _ in self.named_parameters() if name.startswith(text))
        self.language_projection = nn.Linear(shape.hidden_size, width_out)

    def tokens(self, patches: int) -> int:
        """Always the number of queries."""
        del patches
        return self.count

    def forward(self, patches: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Image tokens (N, Q, width_out) of patch features (N, P, width_in).

        ids, mask: the questions (N, L), given exactly where the connector reads them.
        """
        queries = self.query_tokens.expand(patches.shape[0], -1, -1)  # (N, Q, hidden)
        if ids is None or mask is None:
            found = self.qformer(query_embeds=queries, encoder_hidden_states=patches)
        else:
            seen = torch.cat([mask.new_ones(queries.shape[:2]), mask], dim=1)  # (N, Q + L)
            found = self.qformer(
                input_ids=ids, attention_mask=seen, query_embeds=queries, encoder_hidden_states=patches
            )
        return self.language_projection(found.last_hidden_state[:, : queries.shape[1]])
