"""Variance that the complementary pair takes from the loss, measured on held-out rows with training's noise.

Two views of a sample whose masks complete each other, against two views drawn independently: with A and B the two
views' estimates of a row's bound, var((A + B)/2) over (var A + var B)/4. Variances are within a row, over draws; sums
over rows. The weights 1/p make every such figure heavy-tailed, so it comes with an interval, from the jackknife over
draws (Efron and Stein, 1981) on the logarithm of the ratio.

Shapes: d draws, n rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megamask.evaluation.on_engine import EvaluationEngine
from megamask.objectives.base import Key, Objective, Samples

_DEVIATIONS = 1.96  # of a normal distribution: 95 %


@dataclass(frozen=True, kw_only=True)
class PairVariance:
    """The ratio of variances and its 95 % interval; below 1 the pair is better than two independent views.

    Args:
        num_pairs: pairs drawn, over all rows.
    """

    ratio: float
    low: float
    high: float
    num_pairs: int

    def to_json(self) -> dict[str, float | int]:
        """As the journal holds it."""
        return {"ratio": self.ratio, "low": self.low, "high": self.high, "num_pairs": self.num_pairs}


def pair_variance_on_engine(
    engine: EvaluationEngine,
    objective: Objective,
    tokens: Tensor,
    is_eligible: Tensor,
    *,
    draws: int,
    key: Key,
    batch_samples: int,
) -> PairVariance:
    """The ratio on rows under the run's own layout; collective, the same on every rank.

    Args:
        objective: one that makes two views of a sample.
        tokens: int64 [n, s], all rows on every rank. is_eligible: bool [n, s].
        draws: pairs of each row, at least 3.
        key: of the noise; not the run's, so that no pair is one of training's.
        batch_samples: samples of a forward pass.
    """
    size, num_rows = engine.mesh.data_parallel_size, len(tokens)
    per_coordinate = -(-num_rows // (size * batch_samples)) * batch_samples
    mine = torch.arange(per_coordinate) * size + engine.mesh.data_parallel_rank
    found: dict[int, list[list[float]]] = {}
    for places in torch.split(mine.clamp(max=num_rows - 1), batch_samples):
        sums = torch.stack(
            [_pairs(engine, objective, tokens, is_eligible, places, draw, key) for draw in range(draws)], dim=1
        )
        found |= {int(row): values for row, values in zip(places, sums.tolist(), strict=True)}
    gathered = engine.gather_objects(found)
    together: dict[int, list[list[float]]] = {}
    for part in gathered or []:
        together = part | together
    values = engine.broadcast_object([together[row] for row in range(num_rows)] if gathered else None)
    return ratio_of(torch.tensor(values, dtype=torch.float64))


def _pairs(
    engine: EvaluationEngine,
    objective: Objective,
    tokens: Tensor,
    is_eligible: Tensor,
    places: Tensor,
    draw: int,
    key: Key,
) -> Tensor:
    """Both views' estimates in nats per token, float64 [rows, 2]."""
    samples = Samples(
        tokens=tokens[places],
        is_eligible=is_eligible[places],
        sample_index=places + draw * len(tokens),
        batch_position=[0] * len(places),
        global_batch_size=1,
    )
    seen = objective.seen(samples, key)
    sums = engine.score(objective.rows(seen, draw + 1, key)).reshape(len(places), -1)
    return sums / seen.is_eligible.sum(dim=1, keepdim=True).clamp(min=1)


def ratio_of(estimates: Tensor) -> PairVariance:
    """The ratio and its interval. Shapes: estimates float64 [n, d, 2], of both views.

    Raises:
        ValueError: fewer than 3 draws, which have no jackknife.
    """
    num_rows, draws, _ = estimates.shape
    if draws < 3:
        raise ValueError(f"{draws} draws; the jackknife needs 3")
    number = torch.arange(draws)
    logs = [_log_ratio(estimates[:, number != left_out]) for left_out in range(draws)]
    mean = math.fsum(logs) / draws
    error = math.sqrt((draws - 1) / draws * math.fsum((value - mean) ** 2 for value in logs))
    center = _log_ratio(estimates)
    return PairVariance(
        ratio=math.exp(center),
        low=math.exp(center - _DEVIATIONS * error),
        high=math.exp(center + _DEVIATIONS * error),
        num_pairs=num_rows * draws,
    )


def _log_ratio(estimates: Tensor) -> float:
    of_pair = estimates.mean(dim=2).var(dim=1).sum()
    of_views = estimates.var(dim=1).sum() / 4
    return float(of_pair.log() - of_views.log())
