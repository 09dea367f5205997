from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megamask.diffusion.philox import run_key
from megamask.errors import UsageError
from megamask.evaluation.likelihood import LikelihoodReport, evaluate_rows
from megamask.evaluation.on_engine import evaluate_on_engine
from megamask.objectives.base import Rows
from megamask.objectives.masked import MaskedBound
from support.objectives import on_rows
from support.thread_world import ThreadWorld

MASK = 99
TOKENS = torch.arange(7 * 16).reshape(7, 16) % 50
IS_ELIGIBLE = torch.ones_like(TOKENS, dtype=torch.bool)
IS_ELIGIBLE[6, 5:] = False
OPTIONS = {"draws": 3, "replicates": 4, "key": run_key(3)}
BOUND = MaskedBound(mask_token_id=MASK)


def uneven_cost(x_t: Tensor, x_0: Tensor, is_masked: Tensor) -> Tensor:
    """Depends on the row, on what is masked and on how much: any mix-up of rows shows."""
    visible = (~is_masked).sum(dim=1, keepdim=True)
    return ((x_0 + 1) / (1.0 + visible) * is_masked).sum(dim=1, dtype=torch.float64)


class CountingEngine:
    """One rank at some coordinate; counts forward passes."""

    def __init__(self, world: ThreadWorld, rank: int, *, tensor: int, data: int) -> None:
        self._rank = world.engines[rank]
        self.mesh = SimpleNamespace(data_parallel_rank=rank // tensor % data, data_parallel_size=data)
        self.shapes: list[tuple[int, ...]] = []

    def score(self, rows: Rows) -> Tensor:
        self.shapes.append(tuple(rows.inputs.shape))
        return on_rows(uneven_cost)(rows)

    def gather_objects(self, value: Any) -> Any:
        return self._rank.gather_objects(value)

    def broadcast_object(self, value: Any) -> Any:
        return self._rank.broadcast_object(value)


def _evaluate(tensor: int, data: int, pipeline: int = 1, num_rows: int = 7) -> tuple[list[Any], list[CountingEngine]]:
    world = ThreadWorld(tensor * data * pipeline)
    engines = [CountingEngine(world, rank, tensor=tensor, data=data) for rank in range(world.size)]
    results = world.run(
        lambda engine: evaluate_on_engine(
            engines[engine.rank],
            BOUND,
            TOKENS[:num_rows],
            IS_ELIGIBLE[:num_rows],
            batch_rows=2,
            num_bytes=100,
            **OPTIONS,
        )
    )
    return results, engines


@pytest.mark.parametrize(
    ("tensor", "data", "pipeline"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 3, 2), (1, 8, 1)]
)
def test_every_layout_reports_the_number_of_one_process(tensor: int, data: int, pipeline: int) -> None:
    expected = evaluate_rows(
        on_rows(uneven_cost), BOUND, TOKENS, IS_ELIGIBLE, torch.arange(7), batch_rows=5, num_bytes=100, **OPTIONS
    )
    results, _ = _evaluate(tensor, data, pipeline)
    assert results == [expected] * (tensor * data * pipeline)
    assert isinstance(results[0], LikelihoodReport)


def test_every_coordinate_makes_the_same_calls_when_rows_do_not_divide() -> None:
    _, engines = _evaluate(1, 3)
    assert engines[0].shapes == engines[1].shapes == engines[2].shapes
    assert set(engines[0].shapes) == {(2, 16)}


def test_no_rows_are_refused_on_every_rank() -> None:
    results, _ = _evaluate(1, 2, num_rows=0)
    assert [type(result) for result in results] == [UsageError] * 2
