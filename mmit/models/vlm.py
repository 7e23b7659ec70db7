"""The vision-language model: a vision tower, a connector and a causal language model side by side.

The language model is any ``AutoModelForCausalLM``, used as it is. Every forward pass calls tower, connector, body and
head exactly once on every rank, whatever the batch holds: collectives of data and parameter partitioning stay in step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from mmit.batch import IGNORE, Batch, Encoded, collate
from mmit.errors import DataError
from mmit.images import ImageSpec, normalize
from mmit.models import generation
from mmit.models.absent import AbsentTower
from mmit.models.attention import FLASH, PACKED, attention_arguments
from mmit.models.attention_choice import carried_state, packing_fault, set_attention, sliding_window
from mmit.models.connectors import idle_parameters, questions_for
from mmit.models.head import head_is_plain, labelled_nll, nll_by_own_forward
from mmit.models.language_models import has_experts, row_parameters, token_table
from mmit.models.last_layer import LastLayer, find_last_layer, recompute_layers
from mmit.models.mosaic import lay_out
from mmit.models.needed import all_tokens, needed_tokens
from mmit.models.placement import placement, runnable
from mmit.models.rules import NEW_TOKENS, TrainGroup, apply_rules
from mmit.models.shared_prefix import share_prefix
from mmit.models.shared_rows import RowGroup
from mmit.tiling import TilePlan

logger = logging.getLogger("mmit")


class VisionLanguageModel(nn.Module):
    """Tower, connector and language model as ``vision_tower``, ``multi_modal_projector`` and ``language_model``.

    spec: how pictures become pixels and how many image tokens a tile takes; image_id: the token id that stands where
    an image token will be put. image_newline: (D,), the token that ends a row of a tiled picture, where ``spec`` has
    one. vocabulary: ids below it share the probability in the loss; None: all that have a row. tokens: ids below it
    have a text and can be answered; token tables are often longer. new_ids: those of tokens that the run file added;
    ``by_row`` names the tables of which only their rows train. row_group: the ranks that share a row with this one in
    ``forward`` (see ``share_rows``). ``packing_fault`` says why samples may not share a row; it is empty where they
    may. Raises ConfigError for parts that do not fit.
    """

    def __init__(
        self,
        *,
        vision_tower: nn.Module,
        connector: nn.Module,
        language_model: PreTrainedModel,
        spec: ImageSpec,
        image_id: int,
        image_newline: nn.Parameter | None = None,
        vocabulary: int | None = None,
        tokens: int | None = None,
        new_ids: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        assert (image_newline is not None) == spec.has_newline, "the newline token and the tiling belong together"
        self.image_newline = image_newline
        self.vision_tower = vision_tower
        self.multi_modal_projector = connector
        self.language_model = language_model
        self.spec = spec
        self.image_id = image_id
        self.vocabulary = vocabulary
        self.tokens = tokens
        self.new_ids = new_ids
        self.by_row: frozenset[str] = frozenset()
        self.row_group: RowGroup | None = None
        if language_model.can_generate():
            # A model's own generation settings (a penalty, a temperature) would change what "greedy" means here.
            language_model.generation_config = GenerationConfig()
        self.placement = placement()
        self.placement.place(self)
        self.eval()
        self.use_attention("auto")
        with runnable(language_model, self.placement):
            self.head_is_plain = not self.placement.holds or head_is_plain(language_model)
            runs = self.placement.holds and self.head_is_plain
            self.last_layer = find_last_layer(language_model, self.placement) if runs else LastLayer(())

    def use_attention(self, asked: str) -> None:
        """Run the language model with the attention asked for (``auto`` chooses); outside of training mode only.

        Raises ConfigError where it cannot run here, or lets a token see what follows it.
        """
        self.attention = set_attention(self.language_model, asked)
        self.window = sliding_window(self.language_model)
        self.packing_fault = carried_state(self.language_model)
        if not self.placement.holds:
            return
        with runnable(self.language_model, self.placement):
            self.packing_fault = packing_fault(self.language_model, implementation=self.attention)
        logger.info("attention of %s: %s", type(self.language_model).__name__, self.attention)

    def train(self, mode: bool = True) -> VisionLanguageModel:
        """Switch the mode; the tower stays in eval mode always, the connector (its dropout) while it does not train."""
        super().train(mode)
        self.vision_tower.eval()
        if not any(parameter.requires_grad for parameter in self.multi_modal_projector.parameters()):
            self.multi_modal_projector.eval()
        return self

    def patches(self, pixels: Tensor) -> Tensor:
        """Patch features (N, P, D_vision) of uint8 tiles (N, 3, H, W); a tower that does not train has no gradients."""
        tower_trains = any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and tower_trains):
            return tower_features(self.vision_tower, pixels, self.spec)

    def embed(self, batch: Batch) -> Tensor:
        """Input embeddings (B, T, D) with the image tokens of ``batch.pixels`` (or ``features``) in their places.

        Raises DataError where tiles or places are not as many as the plans of the images say, or questions are missing.
        """
        places = (batch.ids.input_ids.view(-1) == self.image_id).nonzero().view(-1)
        embeddings = self.language_model.get_input_embeddings()(batch.input_ids)
        given = batch.pixels if batch.features is None else batch.features.to(embeddings.dtype)
        tiles = given.shape[0]
        # A rank without images runs one zero tile times 0.0: ranks that skipped the tower would wait for each other.
        given = given if tiles else given.new_zeros((1, *given.shape[1:]))
        patches = self.patches(given) if batch.features is None else given  # (N, P, D_vision)
        images = self.multi_modal_projector(patches, *questions_for(self.multi_modal_projector, batch))  # (N, Q, D)
        plans = batch.plans or (TilePlan(1, images.shape[1]),) * tiles
        expected = sum(plan.tokens for plan in plans)
        if len(places) != expected or tiles != sum(plan.tiles for plan in plans):
            raise DataError(
                f"{len(places)} image placeholders and {tiles} tiles x {images.shape[1]} tokens, but the plans of "
                f"{len(plans)} images say {expected} tokens of {sum(plan.tiles for plan in plans)} tiles; "
                "the batch was encoded with another ImageSpec than the model's"
            )
        images = images.to(embeddings.dtype)
        if self.image_newline is not None:
            # also where no image ends a row: every rank must have a gradient for every parameter that trains
            images = images + self.image_newline.sum() * 0.0
        if tiles == 0:
            return embeddings + images.sum() * 0.0
        newline = None if self.image_newline is None else self.image_newline.to(embeddings.dtype)
        flat = embeddings.view(-1, embeddings.shape[-1])
        places = places.to(flat.device, non_blocking=True)
        return flat.index_copy(0, places, lay_out(images, plans, newline)).view_as(embeddings)

    def forward(self, batch: Batch) -> Tensor:
        """The scalar fp32 sum of -log p over the labelled positions of ``batch``; 0 where there is none."""
        if self.packing_fault:
            self._refuse_packed_rows(batch)
        embeddings = self.embed(batch)
        if not self.head_is_plain:
            told = self._attention(batch.ids.position_ids)
            return nll_by_own_forward(self.language_model, embeddings, batch, vocabulary=self.vocabulary, told=told)
        keeps_rows = self.attention not in (PACKED, FLASH) or self.window is not None or self.packing_fault
        needed = all_tokens(batch.ids) if keeps_rows else needed_tokens(batch.ids)
        positions, by_source = needed.position_ids, batch.by_source
        if self.row_group is not None:
            needed, positions, by_source = self.row_group.part(needed, by_source)
        elif self.attention == PACKED and not (keeps_rows or has_experts(self.language_model)):
            needed = share_prefix(needed, batch.ids, image_id=self.image_id)
        here = needed.to(embeddings.device)
        if here.tokens is not None:
            embeddings = embeddings.flatten(0, 1).index_select(0, here.tokens)[None]  # (1, N, D)
        with self.last_layer.only(here.labelled, here.position_ids.shape):
            hidden = self.language_model.base_model(
                inputs_embeds=embeddings,
                position_ids=here.position_ids,
                use_cache=False,
                **self._attention(positions, needed.samples),
            ).last_hidden_state
        head = cast("nn.Linear", self.language_model.get_output_embeddings())
        states = hidden.flatten(0, 1).index_select(0, here.labelled)  # (S, D)
        return labelled_nll(head, states, here.labels, by_source, vocabulary=self.vocabulary)

    def logits(self, batch: Batch) -> Tensor:
        """Logits (B, T, V) at every position, by the language model's own forward."""
        return self.language_model(
            inputs_embeds=self.embed(batch),
            position_ids=batch.position_ids,
            use_cache=False,
            **self._attention(batch.ids.position_ids),
        ).logits

    @torch.no_grad()
    def generate(
        self,
        prompt: Encoded,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop_ids: Sequence[int] = (),
        on_token: Callable[[int], None] | None = None,
        synced: bool = False,
    ) -> list[int]:
        """Ids of the answer to one prompt (its labels are not looked at), without the stop id that ended it.

        temperature 0 is greedy. ``on_token`` gets each id of the answer once it is known. synced: see ``Sampling``.
        """
        sampling = generation.Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            stop_ids=tuple(stop_ids),
            never=self.never(),
        )
        return generation.answers(self.language_model, [self._embed_alone(prompt)], sampling, on_token=on_token)[0]

    @torch.no_grad()
    def generate_batch(
        self, prompts: Sequence[Encoded], *, max_new_tokens: int, stop_ids: Sequence[int] = ()
    ) -> list[list[int]]:
        """Greedy answers to several prompts; the same as ``generate`` gives."""
        sampling = generation.Sampling(
            max_new_tokens=max_new_tokens, temperature=0.0, top_p=1.0, stop_ids=tuple(stop_ids), never=self.never()
        )
        embeddings = [self._embed_alone(prompt) for prompt in prompts]
        return generation.answers(self.language_model, embeddings, sampling)

    def never(self) -> tuple[int, ...]:
        """Ids that have a row in the token table, and stand in no answer."""
        rows = token_table(self.language_model).num_embeddings
        first = min(limit for limit in (self.vocabulary, self.tokens, rows) if limit is not None)
        return tuple(range(first, rows))

    def train_only(self, rules: Mapping[str, float]) -> list[TrainGroup]:
        """Make exactly the parameters trainable that ``rules`` name; the only place that sets ``requires_grad``.

        rules: part name (connector, language_model, vision_tower, lora, new_tokens), layers of a part
        (``vision_tower.layers.12-``) or regular expression searched in parameter names -> learning rate; later rules
        win, 0 freezes. Asked once. Raises ConfigError for a rule that matches nothing.
        """
        idle = frozenset(f"multi_modal_projector.{name}" for name in idle_parameters(self.multi_modal_projector))
        absent = self.vision_tower.names if isinstance(self.vision_tower, AbsentTower) else ()
        tables = {f"language_model.{name}": table for name, table in row_parameters(self.language_model).items()}
        rows = tuple(tables) if self.new_ids else ()
        groups = apply_rules(self, rules, idle=idle, unused=self._unused_in_tower, absent=absent, rows=rows)
        self.by_row = frozenset(name for group in groups if group.pattern == NEW_TOKENS for name in group.names)
        for name in self.by_row:
            tables[name].register_hook(self._of_new_rows)
        return groups

    def _of_new_rows(self, gradient: Tensor) -> Tensor:
        """The gradient of a table in the rows of new tokens, 0 in all others: AdamW leaves those as they are."""
        ids = torch.tensor(self.new_ids, device=gradient.device)
        return torch.zeros_like(gradient).index_copy_(0, ids, gradient[ids])

    def enable_activation_checkpointing(self, every: int = 1) -> None:
        """Recompute the activations of every ``every``-th layer in the backward pass. Raises ConfigError."""
        recompute_layers(self.language_model, self.last_layer, every=every)

    def _embed_alone(self, prompt: Encoded) -> Tensor:
        """Input embeddings (T, D) of one prompt, on the model's device."""
        batch = collate([[prompt]], pad_id=self.image_id, image_size=self.spec.canvas)
        return self.embed(batch.to(next(self.parameters()).device))[0]

    def _attention(self, position_ids: Tensor, samples: Tensor | None = None) -> dict[str, Any]:
        device, window = self.language_model.device, self.window
        told = position_ids, samples
        return attention_arguments(*told, implementation=self.attention, window=window, device=device)

    def _refuse_packed_rows(self, batch: Batch) -> None:
        """Raise DataError where a trained token stands behind another sample and this model would let it see that."""
        ids = batch.ids
        behind = (ids.position_ids == 0).cumsum(dim=1) > 1
        if bool((behind & (ids.labels != IGNORE)).any()):
            raise DataError(f"rows hold several samples, but {self.packing_fault}; pack one sample per row")

    def _unused_in_tower(self) -> set[str]:
        """Names of the tower's parameters behind the chosen layer: no output depends on them."""
        with self.placement.whole(list(self.vision_tower.parameters())):
            return self._without_gradient_in_tower()

    def _without_gradient_in_tower(self) -> set[str]:
        parameters = dict(self.vision_tower.named_parameters())
        weight = next(iter(parameters.values()))
        before = {name: parameter.requires_grad for name, parameter in parameters.items()}
        self.vision_tower.requires_grad_(True)
        tile = torch.zeros((1, 3, *self.spec.canvas), device=weight.device, dtype=weight.dtype)
        with torch.enable_grad():
            patches = self.vision_tower(tile)
            gradients = torch.autograd.grad(patches.sum(), list(parameters.values()), allow_unused=True)
        for name, parameter in parameters.items():
            parameter.requires_grad_(before[name])
        return {
            f"vision_tower.{name}" for name, gradient in zip(parameters, gradients, strict=True) if gradient is None
        }


def tower_features(tower: nn.Module, pixels: Tensor, spec: ImageSpec) -> Tensor:
    """What ``tower`` makes of uint8 tiles (N, 3, H, W): (N, P, D_vision) in the dtype of its weights."""
    features = tower(normalize(pixels, spec).to(next(tower.parameters()).dtype))
    # A view without the class token goes through other kernels than the same features from disk, and rounds otherwise.
    return features.contiguous()
