"""What weights, gradients and optimizer take on a rank under each ZeRO stage, as DeepSpeed 0.19 allocates them.

With N trained elements of e bytes (4 in fp32, 2 in bf16) on W ranks, DeepSpeed holds

    stage 0   weights, gradients and both moments of AdamW whole; a flat copy of the gradients while they are averaged
    stage 1   master weights and moments of N / W elements in fp32; gradients whole until the step
    stage 2   the same, and gradients leave through buckets of ``reduce_bucket_size`` elements to N / W
    stage 3   weights of N / W too, gathered while a layer runs (arXiv 1910.02054)

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


def weights_of(model: nn.Module, groups: Sequence[TrainGroup], *, packed: Mapping[str, int]) -> Weights:
    """The weights of a model, on any device. packed: bytes of parameters that will be in fewer bits, by name."""
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
        small=sum(p.nbytes for p in parameters.values() if p.numel() < PERSISTENT),
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
    worst = max(found, key=lambda parts: sum(parts.values()))
    host = 0
    if zero.get("offload_optimizer"):
        worst, host = _offloaded(weights, zero, activations, ranks)
    if zero.get("offload_param"):
        host += weights.bytes // ranks
        worst = {**worst, WEIGHTS: min(worst[WEIGHTS], _gathered(weights, zero) + weights.small)}
    return RankMemory(parts=worst, host=host)


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
    bucket = int(zero.get("reduce_bucket_size", BUCKET))
    buckets = bucket * size * (2 if zero.get("overlap_comm") else 1)
    whole, own = elements * size, elements * size // ranks
    always = {WEIGHTS: weights.bytes, OPTIMIZER: elements * (MASTER + 2 * MOMENT) // ranks}
    before = own if micro_batches > 1 else 0
    backward = {**always, GRADIENTS: before, BUFFERS: buckets, ACTIVATIONS: activations.released}
    # gradients that no longer fit the bucket leave it while the backward pass goes on
    flushed = {**backward, GRADIENTS: before + own, ACTIVATIONS: activations.after(bucket * size)}
    averaged = before + own
    if zero["stage"] == 1 and not zero.get("overlap_comm"):
        backward[GRADIENTS] = whole if micro_batches > 1 else activations.kept - activations.released
        flushed = backward
        averaged = max(whole, max(0, whole - bucket * size) + own)
    copies = max(weights.groups, default=0) // ranks * (size if size == MASTER else size + MASTER)
    return [
        backward,
        flushed,
        {**always, GRADIENTS: averaged, BUFFERS: buckets},
        {**always, GRADIENTS: own, BUFFERS: copies},
    ]


def _partitioned_weights(
    weights: Weights, zero: Mapping[str, Any], activations: ActivationPeak, ranks: int, micro_batches: int
) -> list[dict[str, int]]:
    del micro_batches  # gradients are added into a buffer that is always there
    size, elements = weights.element, weights.elements
    bucket = int(zero.get("reduce_bucket_size", BUCKET))
    master = 0 if size == MASTER else MASTER
    always = {
        WEIGHTS: weights.bytes // ranks + weights.small,
        OPTIMIZER: elements * (master + 2 * MOMENT) // ranks,
        GRADIENTS: elements * size // ranks,
    }
    gathered = _gathered(weights, zero)
    laid_out = min(elements, max(bucket, weights.largest)) * size  # in the order of the ranks, to be sent
    group = min(max(weights.groups, default=0), int(zero.get("sub_group_size", SUB_GROUP)) * ranks) // ranks
    return [
        {**always, BUFFERS: bucket * size + gathered, ACTIVATIONS: activations.released},
        {**always, BUFFERS: bucket * size + gathered + laid_out, ACTIVATIONS: activations.after(bucket * size)},
        {**always, BUFFERS: bucket * size + gathered + laid_out},
        {**always, BUFFERS: bucket * size + group * (size if size == MASTER else size + MASTER)},
    ]


def _gathered(weights: Weights, zero: Mapping[str, Any]) -> int:
    """Whole weights at a time: those that the backward pass soon needs again stay, and the next are fetched ahead."""
    reuse = int(zero.get("stage3_max_reuse_distance", REUSE))
    ahead = int(zero.get("stage3_prefetch_bucket_size", PREFETCH))
    return min(weights.bytes, (reuse // 2 + ahead) * weights.element + weights.widest)


def _offloaded(
    weights: Weights, zero: Mapping[str, Any], activations: ActivationPeak, ranks: int
) -> tuple[dict[str, int], int]:
    """The worst moment where the optimizer and its gradients live in the host's memory, and what lies there."""
    size, elements = weights.element, weights.elements
    bucket = int(zero.get("reduce_bucket_size", BUCKET)) * size
    host = elements * (MASTER + 2 * MOMENT + MASTER + size) // ranks
    if zero["stage"] == 3:
        during = _gathered(weights, zero) + min(elements * size, bucket)
        held, buffers = weights.bytes // ranks + weights.small, bucket + during
    else:
        held, buffers = weights.bytes, bucket * (2 if zero.get("overlap_comm") else 1) + weights.largest * size
    parts = {WEIGHTS: held, OPTIMIZER: 0, GRADIENTS: 0, BUFFERS: buffers, ACTIVATIONS: activations.released}
    return parts, host
