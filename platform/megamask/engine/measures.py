"""What a step reports: exact counts, known before the forward pass, and float64 sums of what the head scored.

Both are vectors of a fixed length, so that one reduction each makes them global. Shapes: r rows, m scored positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megamask.data.loader import Batch
from megamask.diffusion.corruption import NUM_NOISE_LEVELS, CorruptedBatch

NUM_COUNTS = 4 + NUM_NOISE_LEVELS
NUM_SUMS = 2 + NUM_NOISE_LEVELS


@dataclass(frozen=True, kw_only=True)
class BatchCounts:
    """Counts of a global batch.

    Args:
        num_eligible: clean eligible tokens, once.
        masked_tokens: masked positions of the first view.
        masked_tokens_by_noise_level: masked positions of all views, by the band of the row's mask probability.
        content_sum: sum mod 2^64 of the content hashes.
    """

    num_eligible: int
    masked_tokens: int
    masked_tokens_by_noise_level: list[int]
    content_sum: int

    @classmethod
    def from_sums(cls, sums: Sequence[int]) -> BatchCounts:
        """Reads a vector of `count_share`, summed over the ranks."""
        num_eligible, masked_tokens, low, high, *by_level = sums
        return cls(
            num_eligible=num_eligible,
            masked_tokens=masked_tokens,
            masked_tokens_by_noise_level=by_level,
            content_sum=(low + (high << 32)) % 2**64,
        )


def count_share(batch: Batch, noised: CorruptedBatch, *, num_views: int) -> list[int]:
    """One rank's share of the counts, NUM_COUNTS integers; the content sum travels in two halves of 32 bits."""
    masked = noised.is_masked.sum(dim=1).tolist()
    by_level = [0] * NUM_NOISE_LEVELS
    for level, count in zip(noised.noise_level.tolist(), masked, strict=True):
        by_level[level] += count
    low, high = batch.content_sum & 0xFFFFFFFF, batch.content_sum >> 32
    return [int(batch.is_eligible.sum()), sum(masked[::num_views]), low, high, *by_level]


def sum_scores(
    cross_entropy: torch.Tensor,
    log_normalizer: torch.Tensor,
    weight: torch.Tensor,
    noise_level: torch.Tensor,
    is_used: torch.Tensor,
) -> torch.Tensor:
    """One micro-batch's share of the sums: weight * cross entropy, log Z squared, cross entropy of each noise level.

    Shapes: all [m], weight and noise level those of the position's row; returns float64 [NUM_SUMS], detached.
    """
    entropy = torch.where(is_used, cross_entropy.detach(), 0.0).double()
    squares = torch.where(is_used, log_normalizer.detach(), 0.0).double().square()
    # index_add_ would add in an order of its own on a GPU; a sum over a dimension has one order without any flag
    is_of_level = noise_level.unsqueeze(1) == torch.arange(NUM_NOISE_LEVELS, device=noise_level.device)
    by_level = torch.where(is_of_level, entropy.unsqueeze(1), 0.0).sum(dim=0)
    terms = torch.stack(((entropy * weight.double()).sum(), squares.sum()))
    return torch.cat((terms, by_level))


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The loss of a global batch and its parts.

    Args:
        terms: by name, in nats per eligible token and view; the loss is their sum.
        by_noise_level: mean unweighted cross entropy in nats of the level's masked positions; None where none are.
    """

    terms: dict[str, float]
    by_noise_level: list[float | None]

    @property
    def total(self) -> float:
        """What is minimised."""
        return sum(self.terms.values())

    @classmethod
    def from_sums(cls, sums: Sequence[float], counts: BatchCounts, *, num_terms: int, z_loss_weight: float) -> Losses:
        """Reads a vector of `sum_scores`, summed over micro-batches and ranks.

        Args:
            num_terms: N of the loss law.
            z_loss_weight: objective.z_loss_weight; at 0 there is no such term.
        """
        nelbo, squares, *by_level = sums
        terms = {"nelbo": nelbo / num_terms}
        if z_loss_weight > 0:
            terms["z_loss"] = z_loss_weight * squares / num_terms
        means = [
            total / count if count else None
            for total, count in zip(by_level, counts.masked_tokens_by_noise_level, strict=True)
        ]
        return cls(terms=terms, by_noise_level=means)
