"""Figures that a step reports: exact counts, known before the forward pass, and float64 sums of what the head scored.

Both are vectors of a fixed length, so that one reduction each makes them global. Shapes: r rows, i positions, m scored
positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megamask.diffusion.corruption import NUM_NOISE_LEVELS
from megamask.objectives.base import Objective, Rows
from megamask.objectives.terms import Counts, Scores

if TYPE_CHECKING:
    from megamask.data.loader import Batch


@dataclass(frozen=True, kw_only=True)
class BatchCounts:
    """Counts of a global batch.

    Args:
        num_eligible: clean eligible tokens, once.
        masked_tokens: scored positions of the first view that have a noise level.
        masked_tokens_by_noise_level: scored positions of all views, by noise level.
        num_scored: scored positions of all views, by part of the loss.
        content_sum: sum mod 2^64 of the content hashes.
    """

    num_eligible: int
    masked_tokens: int
    masked_tokens_by_noise_level: list[int]
    num_scored: list[int]
    content_sum: int

    @classmethod
    def from_sums(cls, sums: Sequence[int]) -> BatchCounts:
        """Read a vector of `count_share`, summed over the ranks."""
        num_eligible, masked_tokens, low, high, *others = sums
        return cls(
            num_eligible=num_eligible,
            masked_tokens=masked_tokens,
            masked_tokens_by_noise_level=others[:NUM_NOISE_LEVELS],
            num_scored=others[NUM_NOISE_LEVELS:],
            content_sum=(low + (high << 32)) % 2**64,
        )

    @property
    def of_terms(self) -> Counts:
        """Counts that the normalisers of the loss are made of."""
        return Counts(num_eligible=self.num_eligible, num_scored=self.num_scored)


def num_counts(objective: Objective) -> int:
    """Length of a vector of `count_share`."""
    return 4 + NUM_NOISE_LEVELS + objective.num_parts


def count_share(batch: Batch, is_eligible: torch.Tensor, rows: Rows, objective: Objective) -> list[int]:
    """One rank's share of the counts; the content sum travels in two halves of 32 bits.

    Args:
        is_eligible: bool [b, s], of the samples as the objective sees them.
    """
    num_views = objective.shape(batch.tokens.size(1)).num_views
    is_grouped = rows.is_scored & (rows.group >= 0)
    by_level = torch.bincount(rows.group[is_grouped], minlength=NUM_NOISE_LEVELS).tolist()
    part = torch.zeros((), dtype=torch.int64, device=rows.group.device) if rows.part is None else rows.part
    scored_parts = part.expand_as(rows.is_scored)[rows.is_scored]
    by_part = torch.bincount(scored_parts, minlength=objective.num_parts).tolist()
    low, high = batch.content_sum & 0xFFFFFFFF, batch.content_sum >> 32
    first_view = int(is_grouped[::num_views].sum())
    return [int(is_eligible.sum()), first_view, low, high, *by_level, *by_part]


def sum_scores(objective: Objective, scores: Scores, group: torch.Tensor) -> torch.Tensor:
    """One micro-batch's share of the sums: each term's, then the cross entropy of each noise level.

    Shapes: group int64 [m]; returns float64 [number of terms + NUM_NOISE_LEVELS], detached.
    """
    entropy = torch.where(scores.is_used, scores.cross_entropy.detach(), 0.0).double()
    # index_add_ would add in an order of its own on a GPU; a sum over a dimension has one order without any flag
    is_of_level = group.unsqueeze(1) == torch.arange(NUM_NOISE_LEVELS, device=group.device)
    by_level = torch.where(is_of_level, entropy.unsqueeze(1), 0.0).sum(dim=0)
    return torch.cat((torch.stack([term.measure(scores) for term in objective.terms]), by_level))


def num_sums(objective: Objective) -> int:
    """Length of a vector of `sum_scores`."""
    return len(objective.terms) + NUM_NOISE_LEVELS


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The loss of a global batch and its parts.

    Args:
        terms: by name, in nats per token; the loss is their sum.
        nelbo: the bound on the negative log-likelihood, without its factor in the loss; None where no term does.
        by_noise_level: mean unweighted cross entropy in nats of the level's positions; None where there are none.
        expert_counts: tokens by layer and expert, all views; None for a dense network.
    """

    terms: dict[str, float]
    nelbo: float | None
    by_noise_level: list[float | None]
    expert_counts: list[list[int]] | None = None

    @property
    def total(self) -> float:
        """The loss that is minimised."""
        return sum(self.terms.values())

    @classmethod
    def from_sums(cls, sums: Sequence[float], counts: BatchCounts, objective: Objective) -> Losses:
        """Read a vector of `sum_scores`, summed over micro-batches and ranks."""
        num_terms = len(objective.terms)
        by_term = list(zip(objective.terms, sums[:num_terms], strict=True))
        terms = {
            term.name: term.factor * total / term.normalizer(counts.of_terms) + term.constant for term, total in by_term
        }
        means = [
            total / count if count else None
            for total, count in zip(sums[num_terms:], counts.masked_tokens_by_noise_level, strict=True)
        ]
        bounds = [total / term.normalizer(counts.of_terms) + term.constant for term, total in by_term if term.is_bound]
        return cls(terms=terms, nelbo=bounds[0] if bounds else None, by_noise_level=means)
