"""The NELBO's sum and its divisor as functions, for tests of the loss."""

from __future__ import annotations

from torch import Tensor

from megamask.objectives.terms import Counts, CrossEntropyTerm, PerEligibleToken, Scores


def normalizer(num_eligible: int, num_views: int) -> int:
    return PerEligibleToken(num_views=num_views)(Counts(num_eligible=num_eligible, num_scored=[0]))


def weighted_cross_entropy_sum(cross_entropy: Tensor, weight: Tensor, is_used: Tensor) -> Tensor:
    term = CrossEntropyTerm(name="nelbo", normalizer=PerEligibleToken(num_views=1))
    return term.share(
        Scores(cross_entropy=cross_entropy, log_normalizer=cross_entropy, weight=weight, part=None, is_used=is_used)
    )
