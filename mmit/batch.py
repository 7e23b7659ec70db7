"""The contract between data and model: one encoded sample, and the batch that a forward pass takes.

``data`` makes these, ``models`` consumes them, and neither imports the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from mmit.tiling import TilePlan

IGNORE = -100
"""Label of a position that is not trained; the same number as in torch's cross-entropy."""


@dataclass(frozen=True, kw_only=True)
class Instructions:
    """What each tile's turn asks, in tokens of a connector that reads it.

    ids, mask: (N, L) int64, one row for each tile; the mask is 1 at tokens and 0 at padding behind them.
    """

    ids: Tensor
    mask: Tensor

    def to(self, device: torch.device | str) -> Instructions:
        """The same with its tensors on ``device``."""
        return Instructions(ids=self.ids.to(device, non_blocking=True), mask=self.mask.to(device, non_blocking=True))

    def pin_memory(self) -> Instructions:
        """The same in page-locked memory."""
        return Instructions(ids=self.ids.pin_memory(), mask=self.mask.pin_memory())


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One sample, ready to be packed.

    input_ids: (T,) int64; every image token holds the image token id.
    labels: (T,) int64, **already shifted**: ``labels[t]`` is what position t has to predict, or IGNORE (so the last).
    pixels: (N, 3, H, W) uint8 tiles in the order of their placeholders; N may be 0.
    features: (N, P, D_vision) bf16, where the encoder's cached outputs are used in place of pixels.
    plans: of every image in that order, how its tiles become its tokens; empty: every tile is an image of its own.
    instructions: of every tile, where the connector reads them.
    """

    id: str
    input_ids: Tensor
    labels: Tensor
    pixels: Tensor
    features: Tensor | None = None
    plans: tuple[TilePlan, ...] = ()
    instructions: Instructions | None = None

    @property
    def length(self) -> int:
        """Tokens of the sample, image tokens included."""
        return self.input_ids.shape[0]

    @property
    def trained_tokens(self) -> int:
        """Number of positions with a label."""
        return int((self.labels != IGNORE).sum())


@dataclass(frozen=True, kw_only=True)
class BySource:
    """The loss of a batch by source of the mixture: who owns each label, and sums that a forward pass adds to.

    source_of: (S,) int64, the source of every label that is not IGNORE, in reading order.
    nll: (K,) float64, sum of -log p of each source; zeros before the forward pass.
    trained_tokens: labels of each source.
    """

    source_of: Tensor
    nll: Tensor
    trained_tokens: tuple[int, ...]

    def to(self, device: torch.device | str) -> BySource:
        """The same with its tensors on ``device``."""
        return replace(self, source_of=self.source_of.to(device, non_blocking=True), nll=self.nll.to(device))

    def add(self, nll: Tensor, first: int) -> None:
        """Count in -log p (C,) of the labels first, first + 1, ..."""
        owners = self.source_of[first : first + len(nll)]
        self.nll.index_add_(0, owners, nll.detach().to(self.nll.dtype))


@dataclass(frozen=True, kw_only=True)
class HostIds:
    """The integers of a batch, (B, T) each, on the CPU: what can be known from them is known without the device."""

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one forward pass takes: B rows of T tokens, each row a concatenation of whole samples.

    input_ids, labels: (B, T) int64, labels already shifted (see Encoded).
    position_ids: (B, T) int64, restarting at 0 with every sample; padding at the end of a row is a sample of its own.
    pixels: (N, 3, H, W) uint8, all tiles of all rows in reading order; N may be 0.
    plans: of every image of all rows in reading order (see Encoded).
    trained_tokens: number of labels that are not IGNORE, kept as an int so that no device has to be asked.
    sample_ids: ids of the samples inside, for error messages and the record of what was seen.
    tokens: tokens of the samples, without padding.
    by_source: where the loss of each source of the mixture is asked for; else None.
    features: (N, P, D_vision) bf16, what the encoder made of the tiles; there are no pixels then.
    instructions: of every tile, where the connector reads them (None also where there is no tile).
    squares: sum of the squares of the samples' lengths, which the work of attention grows with.
    host: the integers as they were before the batch went to its device; None before.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    pixels: Tensor
    trained_tokens: int
    sample_ids: tuple[str, ...]
    tokens: int
    plans: tuple[TilePlan, ...] = ()
    by_source: BySource | None = None
    features: Tensor | None = None
    instructions: Instructions | None = None
    squares: int = 0
    host: HostIds | None = None

    @property
    def tiles(self) -> int:
        """Tiles of all rows."""
        return (self.pixels if self.features is None else self.features).shape[0]

    @property
    def ids(self) -> HostIds:
        """The integers, on the CPU."""
        own = HostIds(input_ids=self.input_ids, position_ids=self.position_ids, labels=self.labels)
        return self.host or own

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on ``device``."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            pixels=self.pixels.to(device, non_blocking=True),
            features=None if self.features is None else self.features.to(device, non_blocking=True),
            instructions=self.instructions and self.instructions.to(device),
            by_source=self.by_source and self.by_source.to(device),
            host=self.ids,
        )

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (called by torch's DataLoader)."""
        return replace(
            self,
            input_ids=self.input_ids.pin_memory(),
            position_ids=self.position_ids.pin_memory(),
            labels=self.labels.pin_memory(),
            pixels=self.pixels.pin_memory(),
            features=None if self.features is None else self.features.pin_memory(),
            instructions=self.instructions and self.instructions.pin_memory(),
        )


def collate(
    rows: list[list[Encoded]],
    *,
    pad_id: int,
    image_size: tuple[int, int],
    feature_size: tuple[int, int] | None = None,
    sources: list[list[int]] | None = None,
    source_count: int = 0,
) -> Batch:
    """Concatenate the samples of each row, pad rows to the longest, stack the tiles.

    rows: B lists of samples; an empty list gives a row of padding only.
    image_size: (H, W), used for the shape of an empty ``pixels``.
    feature_size: (P, D_vision) where the samples carry features.
    sources: the source of each sample, of ``source_count``; gives the batch its ``by_source``.
    """
    width = max((sum(sample.length for sample in row) for row in rows), default=0)
    width = max(width, 1)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORE, dtype=torch.int64)
    position_ids = torch.zeros((len(rows), width), dtype=torch.int64)
    pixels: list[Tensor] = []
    features: list[Tensor] = []
    questions = [found for row in rows for sample in row if (found := sample.instructions) is not None]
    for r, row in enumerate(rows):
        start = 0
        for sample in row:
            end = start + sample.length
            input_ids[r, start:end] = sample.input_ids
            labels[r, start:end] = sample.labels
            position_ids[r, start:end] = torch.arange(sample.length)
            if sample.pixels.shape[0]:
                pixels.append(sample.pixels)
            if sample.features is not None:
                features.append(sample.features)
            start = end
        position_ids[r, start:] = torch.arange(width - start)
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        labels=labels,
        pixels=torch.cat(pixels) if pixels else torch.zeros((0, 3, *image_size), dtype=torch.uint8),
        trained_tokens=int((labels != IGNORE).sum()),
        sample_ids=tuple(sample.id for row in rows for sample in row),
        tokens=sum(sample.length for row in rows for sample in row),
        plans=tuple(plan for row in rows for sample in row for plan in sample.plans),
        by_source=None if sources is None else _by_source(rows, sources, source_count),
        features=feature_size and torch.cat([torch.zeros((0, *feature_size), dtype=torch.bfloat16), *features]),
        instructions=join_instructions(questions) if questions else None,
        squares=sum(sample.length**2 for row in rows for sample in row),
    )


def join_instructions(parts: Sequence[Instructions]) -> Instructions:
    """The rows of all parts, padded to the longest."""
    width = max((part.ids.shape[1] for part in parts), default=1)
    ids, mask = (
        [functional.pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors]
        for tensors in ([part.ids for part in parts], [part.mask for part in parts])
    )
    none = torch.zeros((0, width), dtype=torch.int64)
    return Instructions(ids=torch.cat([none, *ids]), mask=torch.cat([none, *mask]))


def _by_source(rows: list[list[Encoded]], sources: list[list[int]], source_count: int) -> BySource:
    owners = torch.tensor([source for row in sources for source in row], dtype=torch.int64)
    labels = torch.tensor([sample.trained_tokens for row in rows for sample in row], dtype=torch.int64)
    counts = torch.zeros(source_count, dtype=torch.int64).index_add_(0, owners, labels)
    return BySource(
        source_of=owners.repeat_interleave(labels),
        nll=torch.zeros(source_count, dtype=torch.float64),
        trained_tokens=tuple(counts.tolist()),
    )
