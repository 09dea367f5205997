"""The ratio of the pair's variance to that of two independent views, against its closed form."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megamask.evaluation.pair_variance import pair_variance_on_engine, ratio_of
from megamask.objectives.base import Rows
from support.model_documents import model_document
from support.objectives import masked_objective
from support.thread_world import ThreadWorld

VOCABULARY = model_document().vocabulary
TOKENS = torch.full((6, 64), 3)


class ConstantCost:
    """One rank of a network under which every token costs 2 nats."""

    def __init__(self, world: ThreadWorld, rank: int, data: int) -> None:
        self._rank = world.engines[rank]
        self.mesh = SimpleNamespace(data_parallel_rank=rank % data, data_parallel_size=data)

    def score(self, rows: Rows) -> Tensor:
        return (2.0 * rows.weight.double() * rows.is_scored).sum(dim=1)

    def gather_objects(self, value: Any) -> Any:
        return self._rank.gather_objects(value)

    def broadcast_object(self, value: Any) -> Any:
        return self._rank.broadcast_object(value)


def measure(data: int, draws: int = 300) -> list[Any]:
    world = ThreadWorld(data)
    return world.run(
        lambda engine: pair_variance_on_engine(
            ConstantCost(world, engine.rank, data),
            masked_objective(VOCABULARY),
            TOKENS,
            torch.ones_like(TOKENS, dtype=torch.bool),
            draws=draws,
            key=(5, 1),
            batch_samples=6 // data,
        )
    )


@pytest.mark.promise("the variance that the complementary pair saves is measured, with an interval")
def test_ratio_of_a_constant_cost_is_its_closed_form_within_the_interval() -> None:
    # With K ~ Bin(n, p) masks the views are A = (K/n)/p and B = (1 - K/n)/(1 - p). Given p their variances are
    # (1 - p)/(np) and p/(n(1 - p)) and their covariance is -1/n; the means over p from e to 1 - e follow.
    [found] = measure(1)
    e, n = 1e-3, 64
    big = math.log((1 - e) / e)
    mean_of_inverse = big / (1 - 2 * e)
    variance = (mean_of_inverse - 1) / n  # of A, and of B
    covariance = -1 / n
    expected = (2 * variance + 2 * covariance) / (2 * variance)
    assert found.low < expected < found.high
    assert found.ratio == pytest.approx(expected, abs=0.15)
    assert found.num_pairs == 1800


def test_ratio_is_the_same_on_two_data_parallel_ranks_and_follows_the_dependence_of_the_views() -> None:
    [one], two = measure(1, 6), measure(2, 6)
    assert all(found == one for found in two)
    generator = torch.Generator().manual_seed(1)
    first = torch.rand(20, 50, generator=generator, dtype=torch.float64)
    assert ratio_of(torch.stack((first, -first + 1e-3 * first**2), dim=2)).ratio < 0.01
    assert ratio_of(torch.stack((first, first), dim=2)).ratio == pytest.approx(2.0)
    independent = ratio_of(torch.rand(20, 50, 2, generator=generator, dtype=torch.float64))
    assert independent.low < 1 < independent.high
    with pytest.raises(ValueError, match="needs 3"):
        ratio_of(torch.rand(2, 2, 2, dtype=torch.float64))
