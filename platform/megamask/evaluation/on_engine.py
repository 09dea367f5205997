"""The likelihood bound during training: rows dealt over data-parallel coordinates, combined in row order."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from megamask.evaluation.likelihood import LikelihoodReport, row_estimates, summarize
from megamask.objectives.base import Bound, Rows


class Coordinates(Protocol):
    """This rank's place on the data-parallel axis."""

    @property
    def data_parallel_rank(self) -> int:
        """This rank's data-parallel coordinate."""

    @property
    def data_parallel_size(self) -> int:
        """Data-parallel coordinates."""


class EvaluationEngine(Protocol):
    """Interface of the engine for evaluation; all ranks call the methods together."""

    @property
    def mesh(self) -> Coordinates:
        """Coordinates of this rank."""

    def score(self, rows: Rows) -> Tensor:
        """Row sums in float64 [r], forward only; the same answer on all ranks of this data-parallel coordinate."""

    def gather_objects(self, value: Any) -> list[Any]:
        """The values of all ranks in rank order, at least on rank 0."""

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""


def evaluate_on_engine(
    engine: EvaluationEngine,
    bound: Bound,
    tokens: Tensor,
    is_eligible: Tensor,
    *,
    draws: int,
    replicates: int,
    key: tuple[int, int],
    batch_rows: int,
    num_bytes: int | None = None,
) -> LikelihoodReport:
    """The bound on rows 0, 1, ... under the run's own layout; collective, the same report on every rank.

    Every coordinate makes the same number of forward passes: one with fewer rows scores its last row once more and the
    result is dropped. Layouts differ only by the summation order inside the network.

    Args:
        tokens: [n, s] int64, all rows on every rank. is_eligible: [n, s] bool.
    """
    if bound.is_exact:
        draws = replicates = 1
    size, num_rows = engine.mesh.data_parallel_size, len(tokens)
    per_coordinate = -(-num_rows // size)
    places = torch.arange(per_coordinate, device=tokens.device) * size + engine.mesh.data_parallel_rank
    mine = places.clamp(max=max(0, num_rows - 1))
    estimates = row_estimates(
        engine.score,
        bound,
        tokens[mine],
        is_eligible[mine],
        mine,
        draws=draws,
        replicates=replicates,
        key=key,
        batch_rows=batch_rows,
    )
    gathered = engine.gather_objects((engine.mesh.data_parallel_rank, estimates.tolist()))
    combined = engine.broadcast_object(_combine(gathered, num_rows, size) if gathered else None)
    everything = torch.tensor(combined, dtype=torch.float64).reshape(replicates, num_rows)
    return summarize(everything, bound.scored(tokens, is_eligible).sum(dim=1), draws=draws, num_bytes=num_bytes)


def _combine(gathered: list[tuple[int, list[list[float]]]], num_rows: int, size: int) -> list[list[float]]:
    """[replicates][row]: row i comes from coordinate i mod size, from the first rank that has that coordinate."""
    by_coordinate: dict[int, list[list[float]]] = {}
    for coordinate, estimates in gathered:
        by_coordinate.setdefault(coordinate, estimates)
    replicates = len(by_coordinate[0])
    return [
        [by_coordinate[row % size][replicate][row // size] for row in range(num_rows)]
        for replicate in range(replicates)
    ]
