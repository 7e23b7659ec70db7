"""How the tokens of a row are dealt to the ranks that share it."""

from typing import Any

import torch

from mmit.batch import BySource
from mmit.models.needed import Needed
from mmit.models.shared_rows import RowGroup


def test_the_parts_of_a_row_hold_each_token_and_each_label_once() -> None:
    # samples of 4 and 3 tokens, labels at the places 1, 2 and 5 of sources 0, 0 and 1; two ranks run 4 tokens each
    needed = Needed(
        tokens=torch.tensor([0, 1, 2, 3, 10, 11, 12]),
        position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2]]),
        labelled=torch.tensor([1, 2, 5]),
        labels=torch.tensor([7, 8, 9]),
    )
    by_source = BySource(
        source_of=torch.tensor([0, 0, 1]), nll=torch.zeros(2, dtype=torch.float64), trained_tokens=(2, 1)
    )
    ranks: Any = None  # nothing is sent
    parts = [RowGroup(ranks, number, 2).part(needed, by_source) for number in range(2)]
    (first, positions, its_sources), (second, other_positions, their_sources) = parts
    assert positions.tolist() == other_positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]
    assert first.tokens is not None
    assert second.tokens is not None
    assert first.tokens.tolist() == [0, 1, 2, 3]
    assert second.tokens.tolist() == [10, 11, 12, 0]  # padding is a sample of its own, without a label
    assert [first.position_ids.tolist(), second.position_ids.tolist()] == [[[0, 1, 2, 3]], [[0, 1, 2, 0]]]
    assert [first.labelled.tolist(), second.labelled.tolist()] == [[1, 2], [1]]
    assert [first.labels.tolist(), second.labels.tolist()] == [[7, 8], [9]]
    assert its_sources is not None
    assert their_sources is not None
    assert [its_sources.source_of.tolist(), their_sources.source_of.tolist()] == [[0, 0], [1]]
    assert its_sources.nll is their_sources.nll is by_source.nll
