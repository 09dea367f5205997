from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megamask.diffusion.corruption import NUM_NOISE_LEVELS
from megamask.engine.measures import num_sums, sum_scores
from megamask.objectives.terms import Scores
from support import engine_cases as cases

OBJECTIVE = cases.objective(z_loss_weight=0.5)


class _Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def _positions(count: int) -> tuple[Scores, torch.Tensor]:
    """Scores, and noise levels of which the last one never occurs."""
    generator = torch.Generator().manual_seed(7)
    scores = Scores(
        cross_entropy=torch.rand(count, generator=generator) * 9,
        log_normalizer=torch.rand(count, generator=generator) * 5,
        weight=torch.rand(count, generator=generator) + 1,
        part=None,
        is_used=torch.rand(count, generator=generator) < 0.8,
    )
    return scores, torch.randint(0, NUM_NOISE_LEVELS - 1, (count,), generator=generator)


def test_scores_are_added_up_over_the_used_positions_and_by_noise_level() -> None:
    scores, group = _positions(500)
    columns = [scores.cross_entropy, scores.log_normalizer, scores.weight, group, scores.is_used]
    used = [row[:4] for row in zip(*(column.tolist() for column in columns), strict=True) if row[4]]
    expected = [
        math.fsum(entropy * weight for entropy, _, weight, _ in used),
        math.fsum(normalizer**2 for _, normalizer, _, _ in used),
        *(math.fsum(row[0] for row in used if row[3] == level) for level in range(NUM_NOISE_LEVELS)),
    ]
    sums = sum_scores(OBJECTIVE, scores, group)
    assert sums.dtype == torch.float64
    assert sums.shape == (num_sums(OBJECTIVE),)
    assert expected[-1] == 0.0
    torch.testing.assert_close(sums, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0.0)


def test_position_that_is_not_finite_shows_in_its_own_level_only() -> None:
    scores, group = _positions(20)
    scores.is_used.fill_(True)
    group[3], scores.cross_entropy[3] = 4, math.nan
    by_level = sum_scores(OBJECTIVE, scores, group)[2:]
    assert [level for level in range(NUM_NOISE_LEVELS) if by_level[level].isnan()] == [4]


def test_scores_are_added_up_without_an_operator_whose_order_a_gpu_leaves_open() -> None:
    with _Operators() as seen:
        sum_scores(OBJECTIVE, *_positions(50))
    assert "sum" in seen.names
    assert not [name for name in seen.names if any(word in name for word in ("index", "scatter", "bincount", "put"))]
