"""Search for the window of mask probabilities in which a block's loss varies least, on held-out rows.

BD3-LM (arXiv:2503.09573, section 4.2 and appendix) trains with mask probabilities from a window and, after each
validation, takes the window of least variance among some widths. The search is the same here; what it finds is
reported, and the config decides (`objective.clip_low`, `objective.clip_high`): a window taken from the network would
make masks depend on a run's history, so that neither a restart nor `megamask inspect` could recompute them.

Shapes: v scored blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megamask.evaluation.on_engine import EvaluationEngine
from megamask.objectives.base import Key, Samples
from megamask.objectives.probing import Probed

_WIDTHS = (50, 60, 70, 80, 90)  # hundredths
_STEP = 5
_MIN_VALUES = 30  # values that a variance needs


@dataclass(frozen=True, kw_only=True)
class ClipSearch:
    """The window of least variance.

    Args:
        low, high: of the mask probability.
        variance: of a block's loss in nats per token inside the window.
        full_variance: over the full range.
        num_blocks: values that were measured.
    """

    low: float
    high: float
    variance: float
    full_variance: float
    num_blocks: int

    def to_json(self) -> dict[str, float | int]:
        """As the journal holds it."""
        return {
            "low": self.low,
            "high": self.high,
            "variance": self.variance,
            "full_variance": self.full_variance,
            "num_blocks": self.num_blocks,
        }


def clip_search_on_engine(
    engine: EvaluationEngine,
    objective: Probed,
    tokens: Tensor,
    is_eligible: Tensor,
    *,
    draws: int,
    key: Key,
    batch_samples: int,
) -> ClipSearch:
    """The window on rows under the run's own layout; collective, the same on every rank.

    Each draw scores one block of each row, over the full range of noise.

    Args:
        tokens: int64 [n, s], all rows on every rank. is_eligible: bool [n, s].
        key: of the noise; not the run's.
        batch_samples: samples of a forward pass.
    """
    size, num_rows = engine.mesh.data_parallel_size, len(tokens)
    per_coordinate = -(-num_rows // (size * batch_samples)) * batch_samples
    mine = torch.arange(per_coordinate) * size + engine.mesh.data_parallel_rank
    full = objective.unclipped()
    found: dict[int, list[list[float]]] = {}
    for places in torch.split(mine.clamp(max=num_rows - 1), batch_samples):
        drawn = []
        for draw in range(draws):
            samples = Samples(
                tokens=tokens[places],
                is_eligible=is_eligible[places],
                sample_index=places + draw * num_rows,
                batch_position=[0] * len(places),
                global_batch_size=1,
            )
            probe = full.probe(full.seen(samples, key), draw + 1, key, block=places + draw)
            values = engine.score(probe.rows) / probe.num_eligible.clamp(min=1)
            drawn.append(torch.stack((probe.probability, values, probe.num_eligible.to(torch.float64)), dim=1))
        for row, values in zip(places.tolist(), torch.stack(drawn, dim=1).tolist(), strict=True):
            found[row] = values
    gathered = engine.gather_objects(found)
    together: dict[int, list[list[float]]] = {}
    for part in gathered or []:
        together = part | together
    flat = [value for row in range(num_rows) for value in together[row]] if gathered else None
    return best_window(torch.tensor(engine.broadcast_object(flat), dtype=torch.float64))


def best_window(measured: Tensor) -> ClipSearch:
    """The window of least variance. Shapes: measured float64 [v, 3]: mask probability, nats per token, tokens."""
    measured = measured[measured[:, 2] > 0]
    probability, values = measured[:, 0], measured[:, 1]
    best = full = float(values.var())
    low, high = 0, 100
    for width in _WIDTHS:
        for start in range(0, 100 - width + 1, _STEP):
            inside = values[(probability >= start / 100) & (probability <= (start + width) / 100)]
            if len(inside) >= _MIN_VALUES and float(inside.var()) < best:
                best, low, high = float(inside.var()), start, start + width
    return ClipSearch(low=low / 100, high=high / 100, variance=best, full_variance=full, num_blocks=len(measured))
