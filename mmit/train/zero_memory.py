"""What weights, gradients and optimizer take on a rank under each ZeRO stage, as DeepSpeed 0.19 allocates them.

With N trained elements of e bytes (4 in fp32, 2 in bf16) on W ranks, DeepSpeed holds

    stage 0   weights, gradients and both moments of AdamW whole; a flat copy of the gradients while they are averaged
    stage 1   master weights and moments of N / W elements in fp32; gradients whole until the step
    stage 2   the same, and gradients leave through buckets of ``reduce_bucket_size`` elements to N / W
    stage 3   weights of N / W too, gathered while a layer runs (arXiv 1910.02054); master weights in fp32 as well

A step has moments that can be the worst: the backward pass, where activations meet what is there already; the averaging
of gradients behind it; and the update. The peak is the worst of them. benchmarks/plan_memory.py holds it to measured
peaks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mmit.models import TrainGroup
from mmit.models.activations import ActivationPeak
from mmit.models.rules import PARTS

WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer"
BUFFERS, ACTIVATIONS = "buffers", "activations"

MASTER = MOMENT = 4
"""Bytes of an element of master weights and of each of AdamW's two moments: always fp32."""

BUCKET, SUB_GROUP = 500_000_000, 1_000_000_000
REUSE, PREFETCH, PERSISTENT = 1_000_000_000, 50_000_000, 100_000
"""DeepSpeed's defaults, in elements: ``reduce_bucket_size``, ``sub_group_size``, ``stage3_max_reuse_distance``,
``stage3_prefetch_bucket_size``, ``stage3_param_persistence_threshold``."""

NORM = 250_000_000
"""Elements of an offloaded gradient whose norm DeepSpeed takes at a time."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights of a model as its training sees them.

    trained, frozen: bytes by part of the model. groups: elements of each optimizer group. element: bytes of one of
    them. largest: elements of the largest trained tensor. small: bytes of tensors that stage 3 does not partition.
    widest: bytes of the largest module's own weights, which stage 3 gathers together.
    """

    trained: Mapping[str, int]
    frozen: Mapping[str, int]
    groups: tuple[int, ...]
    element: int
    largest: int
    small: int
    widest: int

    @property
    def elements(self) -> int:
        """Trained elements."""
        return sum(self.groups)

    @property
    def bytes(self) -> int:
        """All of them, whole."""
        return sum(self.trained.values()) + sum(self.frozen.values())


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """The peak of one rank. parts: bytes on its device by what they are for, at the worst moment. host: offloaded."""

    parts: Mapping[str, int]
    host: int

    @property
    def bytes(self) -> int:
        """On the device."""
        return sum(self.parts.values())


def weights_of(
    model: nn.Module, groups: Sequence[TrainGroup], *, packed: Mapping[str, int], persistent: int = PERSISTENT
) -> Weights:
    """The weights of a model, on any device.

    packed: bytes of parameters that will be in fewer bits, by name. persistent: elements of the smallest parameter
    that stage 3 partitions.
    """
    parameters = dict(model.named_parameters())
    trained, frozen = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    names = {name for group in groups for name in group.names}
    for name, parameter in parameters.items():
        part = next((part for part, beginnings in PARTS.items() if name.startswith(beginnings)), "connector")
        into = trained if name in names else frozen
        into[part] += packed.get(name, parameter.nbytes)
    for name, buffer in model.named_buffers():
        part = next((part for part, beginnings in PARTS.items() if name.startswith(beginnings)), "connector")
        frozen[part] += buffer.nbytes
    sizes = [parameters[name].numel() for name in names]
    return Weights(
        trained=trained,
        frozen=frozen,
        groups=tuple(sum(parameters[name].numel() for name in group.names) for group in groups),
        element=max((parameters[name].element_size() for name in names), default=4),
        largest=max(sizes, default=0),
        small=sum(p.nbytes for p in parameters.values() if p.numel() < persistent),
        widest=max(sum(p.nbytes for p in module.parameters(recurse=False)) for module in model.modules()),
    )


def rank_memory(
    weights: Weights, zero: Mapping[str, Any], activations: ActivationPeak, *, ranks: int, micro_batches: int
) -> RankMemory:
    """The peak of a rank. zero: DeepSpeed's section ``zero_optimization``, as ``deepspeed_config`` makes it."""
    moments = {1: _partitioned_gradients, 2: _partitioned_gradients, 3: _partitioned_weights}.get(
        zero["stage"], _nothing_partitioned
    )
    found = moments(weights, zero, activations, ranks, micro_batches)
    return RankMemory(
        parts=max(found, key=lambda parts: sum(parts.values())), host=_on_host(weights, zero, ranks, micro_batches)
    )


def _nothing_partitioned(
    weights: Weights, zero: Mapping[str, Any], activations: ActivationPeak, ranks: int, micro_batches: int
) -> list[dict[str, int]]:
    gradients = weights.elements * weights.element
    always = {WEIGHTS: weights.bytes, OPTIMIZER: weights.elements * 2 * MOMENT}
    flat = min(gradients, zero.get("reduce_bucket_size", BUCKET) * weights.element) if ranks > 1 else 0
    grown = gradients if micro_batches > 1 else activations.kept - activations.released
    return [
        {**always, GRADIENTS: grown, ACTIVATIONS: activations.released},
        {**always, GRADIENTS: gradients, BUFFERS: flat},
    ]


def _partitioned_gradients(
    weights: Weights, zero: Mapping[str, Any], activations: ActivationPeak, ranks: int, micro_batches: int
) -> list[dict[str, int]]:
    size, elements = weights.element, weights.elements
    overlaps, offloaded = bool(zero.get("overlap_comm")), bool(zero.get("offload_optimizer"))
    bucket = int(zero.get("reduce_bucket_size", BUCKET)) * size
    # made when the first gradient is there, gone when all are averaged: under stage 1 in the last micro-batch only
    buckets = bucket * (2 if overlaps else 1)
    staging = weights.largest * size if offloaded else 0
    whole, own = elements * size, 0 if offloaded else elements * size // ranks
    states = 0 if offloaded else elements * (MASTER + 2 * MOMENT) // ranks
    always = {WEIGHTS: weights.bytes, OPTIMIZER: states, BUFFERS: staging}
    within = {**always, BUFFERS: staging + buckets}
    # stage 2: gradients that no longer fit the bucket leave it while the backward pass goes on
    earlier = own if micro_batches > 1 else 0
    before, during, flushed = earlier, earlier, earlier + own
    averaged = earlier + own
    is_kept = zero["stage"] == 1 and micro_batches > 1
    if is_kept:  # and here only in the last micro-batch
        before = during = whole
        flushed = max(0, whole - bucket) + own
    if zero["stage"] == 1 and not overlaps:  # and even then behind it
        during = flushed = whole if micro_batches > 1 else activations.kept - activations.released
        averaged = max(whole, max(0, whole - bucket) + own)
    moments = [
        {**(within if is_kept else always), GRADIENTS: before, ACTIVATIONS: activations.before},
        {**within, GRADIENTS: during, ACTIVATIONS: activations.after(1)},
        {**within, GRADIENTS: flushed, ACTIVATIONS: activations.after(bucket)},
        {**within, GRADIENTS: averaged},
    ]
    if not offloaded:
        copies = max(weights.groups, default=0) // ranks * (size if size == MASTER else size + MASTER)
        moments.append({**always, GRADIENTS: own, BUFFERS: copies})
    return moments


def _partitioned_weights(
    weights: Weights, zero: Mapping[str, Any], activations: ActivationPeak, ranks: int, micro_batches: int
) -> list[dict[str, int]]:
    del micro_batches  # gradients are added into a buffer that is always there
    size, elements = weights.element, weights.elements
    bucket = int(zero.get("reduce_bucket_size", BUCKET))
    offloaded = bool(zero.get("offload_optimizer"))
    gathered = _gathered(weights, zero)
    always = {
        WEIGHTS: weights.bytes // ranks + weights.small,
        OPTIMIZER: 0 if offloaded else elements * (MASTER + 2 * MOMENT) // ranks,
        GRADIENTS: 0 if offloaded else elements * size // ranks,
    }
    if zero.get("offload_param"):
        always[WEIGHTS] = weights.small + gathered // ranks  # pieces on their way to be gathered
    laid_out = min(elements, max(bucket, weights.largest)) * size  # in the order of the ranks, to be sent
    norm = min(weights.largest // ranks, NORM) * 8 if offloaded else 0  # of one gradient, taken in float64
    sent = bucket * size + gathered + laid_out + norm
    moments = [
        {**always, BUFFERS: bucket * size + gathered, ACTIVATIONS: activations.released},
        {**always, BUFFERS: sent, ACTIVATIONS: activations.after(bucket * size)},
        {**always, BUFFERS: sent},
    ]
    if not offloaded:
        group = min(max(weights.groups, default=0), int(zero.get("sub_group_size", SUB_GROUP)) * ranks) // ranks
        moments.append({**always, BUFFERS: bucket * size + group * (size if size == MASTER else size + MASTER)})
    return moments


def _gathered(weights: Weights, zero: Mapping[str, Any]) -> int:
    """Whole weights at a time: those that the backward pass soon needs again stay, and the next are fetched ahead.

    What is fetched together comes in one piece, and lies there twice while each weight is copied out of it.
    """
    reuse = int(zero.get("stage3_max_reuse_distance", REUSE))
    ahead = int(zero.get("stage3_prefetch_bucket_size", PREFETCH))
    return min(weights.bytes, (reuse // 2 + 2 * ahead) * weights.element + weights.widest)


def _on_host(weights: Weights, zero: Mapping[str, Any], ranks: int, micro_batches: int) -> int:
    """What is offloaded: master weights, moments, gradients in fp32, and a piece of them or of the weights as they are.

    Under stage 2 the gradients of earlier micro-batches lie there besides.
    """
    size, elements = weights.element, weights.elements
    host = 0
    if zero.get("offload_optimizer"):
        host = elements * (MASTER + 2 * MOMENT + MASTER + size) // ranks
        if zero["stage"] != 3:
            host += weights.largest * size + (elements * size // ranks if micro_batches > 1 else 0)
    if zero.get("offload_param"):
        host += weights.bytes // ranks
    return host
