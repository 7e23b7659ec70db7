"""The loss by source: exact, and the loss itself stays the same to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_support import sample
from torch import nn
from torch.nn import functional

from mmit.batch import IGNORE, BySource, Encoded, collate
from mmit.models import LoadedModel
from mmit.models import head as module
from mmit.models.head import labelled_nll


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_the_head_adds_to_the_sum_of_each_labels_source(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk * 11)
    torch.manual_seed(0)
    head, hidden = nn.Linear(5, 11), torch.randn(7, 5)
    labels = torch.tensor([0, 10, 3, 3, 7, 1, 2])
    owners = torch.tensor([0, 0, 2, 2, 2, 0, 2])
    by_source = BySource(source_of=owners, nll=torch.zeros(3, dtype=torch.float64), trained_tokens=(3, 0, 4))
    loss = labelled_nll(head, hidden, labels, by_source)
    assert torch.equal(loss, labelled_nll(head, hidden, labels))
    each = functional.cross_entropy(head(hidden), labels, reduction="none").double()
    expected = torch.stack([each[owners == source].sum() for source in range(3)])
    torch.testing.assert_close(by_source.nll, expected, rtol=0, atol=1e-5)


def rows(loaded: LoadedModel) -> list[list[Encoded]]:
    one = sample(loaded, text=range(40, 50), images=1, trained=4, seed=1)
    two = sample(loaded, text=range(60, 65), images=0, trained=2, seed=2)
    three = sample(loaded, text=range(70, 83), images=2, trained=6, seed=3)
    return [[one, two], [three], []]


@pytest.mark.parametrize("plain_head", [True, False])
def test_the_sums_of_a_batch_are_those_of_its_samples_alone(loaded: LoadedModel, plain_head: bool) -> None:
    settings: dict[str, Any] = {"pad_id": loaded.pad_id, "image_size": loaded.model.spec.size}
    batch = collate(rows(loaded), sources=[[0, 2], [0], []], source_count=3, **settings)
    assert batch.by_source is not None
    assert batch.by_source.trained_tokens == (10, 0, 2)
    assert batch.by_source.source_of.tolist() == [0] * 4 + [2] * 2 + [0] * 6
    assert len(batch.by_source.source_of) == int((batch.labels != IGNORE).sum())
    with torch.no_grad():
        was = loaded.model.head_is_plain
        loaded.model.head_is_plain = plain_head
        try:
            loss = loaded.model(batch)
            alone = [float(loaded.model(collate([[s]], **settings))) for row in rows(loaded) for s in row]
        finally:
            loaded.model.head_is_plain = was
    one, two, three = alone
    assert batch.by_source.nll.tolist() == pytest.approx([one + three, 0.0, two], abs=1e-4)
    assert float(batch.by_source.nll.sum()) == pytest.approx(float(loss), abs=1e-4)
