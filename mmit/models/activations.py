"""Memory of a forward and a backward pass, counted on shapes: what is alive at the worst moment, and whose it is.

The model is on the meta device, where operations make tensors without storage. Each tensor that an operation makes is
counted from its birth until nothing holds it any more, so that what autograd saves, what recomputation spares and what
is written in place are counted as they are, for any language model, connector or adapter. Attention counts as a fused
kernel, which keeps no scores.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, masking_utils

from mmit.batch import IGNORE, Batch, Instructions
from mmit.errors import ConfigError
from mmit.models import attention
from mmit.models.absent import AbsentTower
from mmit.models.connectors import Connector
from mmit.models.language_models import has_experts
from mmit.models.last_layer import LastLayer
from mmit.models.live_tensors import LiveTensors
from mmit.models.loaded import LoadedModel
from mmit.models.vlm import VisionLanguageModel

EMBEDDINGS = "embeddings"
BACKWARD = "gradients on their way"
"""Tensors that the backward pass makes, recomputed activations among them."""

QUESTION_TOKENS = 32
"""Length of a question that a connector reads, where one does."""


class NotOnShapes(ConfigError):
    """A model cannot be run without values."""


@dataclass(frozen=True, kw_only=True)
class RowLoad:
    """What stands in a row: tokens, those with a label, tiles of pictures, and samples."""

    tokens: int
    trained: int
    tiles: int
    samples: int


@dataclass(frozen=True, kw_only=True)
class ActivationPeak:
    """Bytes above the weights, where each weight's gradient leaves as soon as it is made.

    by_part: of the worst moment. curve: from one gradient's leaving, it included, to the next's: bytes of those that
    have left so far, and the most bytes that were alive meanwhile.
    """

    by_part: Mapping[str, int]
    curve: tuple[tuple[int, int], ...]

    @property
    def released(self) -> int:
        """The worst moment."""
        return self.after(0)

    @property
    def before(self) -> int:
        """The worst moment of those before the first gradient of a weight leaves."""
        return self.curve[0][1]

    @property
    def kept(self) -> int:
        """The worst moment where the gradients of weights stay, them included."""
        return max(gradients + alive for gradients, alive in self.curve)

    def after(self, gradients: int) -> int:
        """The worst moment once gradients of so many bytes have left."""
        return max((alive for left, alive in self.curve if left >= gradients), default=0)


def worst_batch(loaded: LoadedModel, row: RowLoad, *, rows: int) -> Batch:
    """A micro-batch of ``rows`` rows like ``row``: integers on the CPU, pictures (or features) without storage."""
    spec, model = loaded.model.spec, loaded.model
    tiles = min(row.tiles, row.tokens // spec.tokens_per_tile)
    ids = torch.full((rows, row.tokens), loaded.pad_id)
    ids[:, : tiles * spec.tokens_per_tile] = loaded.image_id
    sample = -(-row.tokens // max(1, row.samples))
    positions = torch.arange(row.tokens) % sample
    # labels stand at the end of each sample: what is behind the last one would not be computed
    trained = positions >= sample - max(1, row.trained // max(1, row.samples))
    trained[-1] = True
    labels = torch.where(trained, 0, IGNORE).expand(rows, -1).contiguous()
    tower = model.vision_tower
    features = pixels = torch.empty((rows * tiles, 3, *spec.canvas), dtype=torch.uint8, device="meta")
    if isinstance(tower, AbsentTower):
        features = torch.empty((rows * tiles, tower.patches, tower.width), dtype=torch.bfloat16, device="meta")
    asked = torch.ones((rows * tiles, QUESTION_TOKENS), dtype=torch.int64)
    return Batch(
        input_ids=ids,
        position_ids=positions.expand(rows, -1).contiguous(),
        labels=labels,
        pixels=pixels,
        trained_tokens=int((labels != IGNORE).sum()),
        sample_ids=(),
        tokens=ids.numel(),
        features=features if isinstance(tower, AbsentTower) else None,
        instructions=Instructions(ids=asked, mask=asked) if loaded.instructions is not None and tiles else None,
    )


def activation_peak(model: VisionLanguageModel, batch: Batch) -> ActivationPeak:
    """The peak of one micro-batch on a model of meta tensors that is set up for training; it is left as it was.

    Raises NotOnShapes where its forward pass asks for values.
    """
    live = _Pass()
    live.ignore((*model.parameters(), *model.buffers()))  # a view of a weight is nothing new
    model.train()
    try:
        with ExitStack() as stack:
            for hook in _watch(model, live):
                stack.callback(hook.remove)
            stack.enter_context(_fused_attention())
            stack.enter_context(_packed_masks())
            stack.enter_context(live)
            loss = model(batch)
            live.part = BACKWARD
            torch.autograd.backward(loss)
    except (RuntimeError, TypeError) as error:  # torch's, of what asks for values: shapes have none
        told = str(error).strip().partition("\n")[0]
        raise NotOnShapes(f"the model does not run on shapes alone, so its activations are unknown: {told}") from error
    finally:
        model.eval()
    return ActivationPeak(by_part={name: size for name, size in live.at_peak.items() if size}, curve=tuple(live.curve))


def likely_last_layer(language_model: PreTrainedModel) -> LastLayer:
    """The submodules of the last layer that will run at labelled positions only, which ``last_layer`` finds by trial.

    By the names they have in the models of Llama's kind; none where these names are not found.
    """
    layers = [module for module in language_model.base_model.modules() if isinstance(module, nn.ModuleList)]
    if has_experts(language_model) or len(layers) != 1:
        return LastLayer(())
    modules = dict(layers[0][-1].named_modules())
    found = [modules[name] for name in ("mlp", "self_attn.q_proj", "self_attn.o_proj") if name in modules]
    return LastLayer(found if len(found) == 3 else ())


class _Pass(LiveTensors):
    """Of one forward and backward pass. curve: see ``ActivationPeak``."""

    def __init__(self) -> None:
        super().__init__()
        self.part = EMBEDDINGS
        self.curve: list[tuple[int, int]] = [(0, 0)]

    def release(self, parameter: nn.Parameter) -> None:
        """Let the gradient of a weight go, as if it had been handed on."""
        assert parameter.grad is not None, "the hook of a gradient that was just made"
        left = self.curve[-1][0] + parameter.grad.nbytes
        self.curve.append((left, self.total))
        parameter.grad = None

    def reached(self, alive: int) -> None:
        """Also note it on the curve."""
        super().reached(alive)
        left, most = self.curve[-1]
        self.curve[-1] = (left, max(most, alive))


def _watch(model: VisionLanguageModel, live: _Pass) -> Iterator[Any]:
    """Hooks that tell whose tensors are made, and let each gradient of a weight go."""
    language_model = model.language_model
    assert isinstance(model.multi_modal_projector, Connector), "build_connector checks it"
    parts = {
        "vision tower": model.vision_tower,
        "connector": model.multi_modal_projector,
        "language model": language_model.base_model,
        "head": language_model.get_output_embeddings(),
    }
    for name, module in parts.items():
        if not isinstance(module, nn.Module):
            continue

        def begin(_module: nn.Module, _inputs: object, name: str = name) -> None:
            live.part = name

        def end(_module: nn.Module, _inputs: object, _output: object) -> None:
            live.part = EMBEDDINGS

        yield module.register_forward_pre_hook(begin)
        yield module.register_forward_hook(end)
    for parameter in model.parameters():
        if parameter.requires_grad:
            yield parameter.register_post_accumulate_grad_hook(live.release)


@contextmanager
def _packed_masks() -> Generator[None]:
    """While in force, transformers makes the mask of packed rows, without asking whether these are any."""
    whole = masking_utils.find_packed_sequence_indices

    def sample_of_each_token(position_ids: Tensor) -> Tensor | None:
        return (position_ids == 0).cumsum(-1)

    masking_utils.__dict__["find_packed_sequence_indices"] = sample_of_each_token
    try:
        yield
    finally:
        masking_utils.__dict__["find_packed_sequence_indices"] = whole


@contextmanager
def _fused_attention() -> Generator[None]:
    """On the meta device torch writes attention out, scores included; while in force it takes the fused kernel."""
    whole = functional.scaled_dot_product_attention

    def fused(  # noqa: PLR0917 - torch's signature, which torch's own modules call by place
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        del enable_gqa
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]

    holders = [module for module in (functional, attention) if hasattr(module, "scaled_dot_product_attention")]
    for module in holders:
        module.__dict__["scaled_dot_product_attention"] = fused
    try:
        yield
    finally:
        for module in holders:
            module.__dict__["scaled_dot_product_attention"] = whole
