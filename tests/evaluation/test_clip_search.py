"""The search for the window of mask probabilities in which a block's loss varies least."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megamask.evaluation.clip_search import best_window, clip_search_on_engine
from megamask.objectives.base import Rows
from megamask.objectives.block import BlockObjective
from support.model_documents import model_document

VOCABULARY = model_document().vocabulary


class OneRank:
    """A network under which every token costs 2 nats."""

    mesh = SimpleNamespace(data_parallel_rank=0, data_parallel_size=1)

    def score(self, rows: Rows) -> Tensor:
        assert int(rows.is_scored.any(dim=1).sum()) <= len(rows.inputs)
        blocks = rows.is_scored[:, :32].reshape(-1, 4, 8).any(dim=2).sum(dim=1)
        assert int(blocks.max()) <= 1  # one block of each row
        return (2.0 * rows.weight.double() * rows.is_scored).sum(dim=1)

    def gather_objects(self, value: Any) -> Any:
        return [value]

    def broadcast_object(self, value: Any) -> Any:
        return value


@pytest.mark.promise("the window of mask probabilities with the least variance is found on held-out rows")
def test_window_of_a_constant_cost_leaves_out_what_is_hardly_masked() -> None:
    objective = BlockObjective(
        vocabulary=VOCABULARY, block_size=8, clean_half="block_causal", mask_logit="excluded", clip_low=0.2
    )
    tokens = torch.full((16, 32), 3)
    found = clip_search_on_engine(
        OneRank(),
        objective,
        tokens,
        torch.ones_like(tokens, dtype=torch.bool),
        draws=100,
        key=(3, 4),
        batch_samples=4,
    )
    # 2/p * K/8 with K ~ Bin(8, p) has variance 4 (1 - p) / (8 p): the fewer masks, the more
    assert found.num_blocks == 1600
    assert found.high == 1.0 and found.low >= 0.4
    assert found.variance < found.full_variance / 3


def test_window_is_the_full_range_where_none_is_better() -> None:
    p = torch.linspace(0, 1, 500, dtype=torch.float64)
    same = torch.stack((p, torch.ones_like(p), torch.ones_like(p)), dim=1)
    assert (best_window(same).low, best_window(same).high) == (0.0, 1.0)
    padding = torch.tensor([[0.5, 99.0, 0.0]], dtype=torch.float64)
    assert best_window(torch.cat((same, padding))) == best_window(same)
