"""The terms of a loss: each a sum over scored positions, divided by an exact integer known before the forward pass.

loss = sum over terms of factor * sum / N. A micro-batch computes its share of each sum; shares add up to the same loss
and gradient on every layout (the loss law of docs/architecture.md). Unit: nats per token.

Shapes: m scored positions of a micro-batch, unused head rows included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megamask.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Exact integers of a global batch.

    Args:
        num_eligible: clean eligible tokens, each once.
        num_scored: scored positions of all views, of each part of the loss.
    """

    num_eligible: int
    num_scored: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Results of the head at the scored positions of a micro-batch; all [m].

    Args:
        cross_entropy, log_normalizer: float32 nats: of the target, and log Z of the softmax.
        weight: float, of each position's cross entropy.
        part: int64, which part of the loss a position belongs to; None where there is one part.
        is_used: bool; other rows of the head count nothing, with any content.
    """

    cross_entropy: Tensor
    log_normalizer: Tensor
    weight: Tensor
    part: Tensor | None
    is_used: Tensor

    def used_by(self, part: int | None) -> Tensor:
        """Bool [m]: the used positions of a part; of all parts for None."""
        if part is None or self.part is None:
            return self.is_used
        return self.is_used & (self.part == part)


class Term(Protocol):
    """One sum of the loss."""

    @property
    def name(self) -> str:
        """Of the journal's loss_terms."""

    @property
    def factor(self) -> float:
        """Multiplie the sum in the loss."""

    @property
    def normalizer(self) -> Callable[[Counts], int]:
        """N, at least 1, from the counts of the global batch."""

    @property
    def constant(self) -> float:
        """The term's share of the loss beside its sum, in nats per token; it has no gradient."""

    @property
    def is_bound(self) -> bool:
        """True if sum / N + constant estimates a bound on the negative log-likelihood, in nats per token."""

    def share(self, scores: Scores) -> Tensor:
        """This micro-batch's share of the sum: scalar float32 with a gradient at used positions only."""

    def measure(self, scores: Scores) -> Tensor:
        """The same share for the record: scalar float64, detached."""


@dataclass(frozen=True, kw_only=True)
class CrossEntropyTerm:
    """The sum of weight * cross entropy.

    Args:
        part: positions that belong to it; None for all.
        constant: nats per token that no weight of the network changes.
    """

    name: str
    normalizer: Callable[[Counts], int]
    factor: float = 1.0
    part: int | None = None
    constant: float = 0.0
    is_bound: bool = False

    def share(self, scores: Scores) -> Tensor:
        """Scalar float32, with a gradient at the used positions of the part."""
        used = torch.where(scores.used_by(self.part), scores.cross_entropy.float(), 0.0)
        return (used * scores.weight).sum()

    def measure(self, scores: Scores) -> Tensor:
        """Scalar float64, detached."""
        entropy = torch.where(scores.used_by(self.part), scores.cross_entropy.detach(), 0.0).double()
        return (entropy * scores.weight.double()).sum()


@dataclass(frozen=True, kw_only=True)
class ZLossTerm:
    """The sum of (log Z)^2 over the scored positions, which keeps the softmax's normaliser Z near 1.

    Unweighted: the noise level of a row does not matter. Source: PaLM, arXiv:2204.02311, section 5.
    """

    normalizer: Callable[[Counts], int]
    factor: float
    name: str = "z_loss"
    constant: float = 0.0
    is_bound: bool = False

    def share(self, scores: Scores) -> Tensor:
        """Scalar float32, with a gradient at the used positions."""
        return torch.where(scores.is_used, scores.log_normalizer.float(), 0.0).square().sum()

    def measure(self, scores: Scores) -> Tensor:
        """Scalar float64, detached."""
        return torch.where(scores.is_used, scores.log_normalizer.detach(), 0.0).double().square().sum()


@dataclass(frozen=True, kw_only=True)
class PerEligibleToken:
    """N: eligible tokens of the global batch, times views."""

    num_views: int

    def __call__(self, counts: Counts) -> int:
        """Raise UsageError if no token is eligible: the loss would be undefined."""
        return _at_least_one(counts.num_eligible * self.num_views, "eligible")


@dataclass(frozen=True, kw_only=True)
class PerScoredToken:
    """N: scored positions of one part of the loss, over the global batch and all views."""

    part: int = 0

    def __call__(self, counts: Counts) -> int:
        """Raise UsageError when no position is scored, so that the loss would not be defined."""
        return _at_least_one(counts.num_scored[self.part], "scored")


def _at_least_one(count: int, kind: str) -> int:
    if count < 1:
        raise UsageError(
            f"a loss needs {kind} tokens, but the global batch of this step has none. The step was not taken.",
            hint="raise training.global_batch_size; with data.score=answers, prepare rows that hold answers",
        )
    return count


def cross_entropy_and_z_loss(
    name: str,
    normalizer: Callable[[Counts], int],
    z_loss_weight: float,
    *,
    is_bound: bool = True,
    constant: float = 0.0,
) -> tuple[Term, ...]:
    """The weighted cross entropy alone, or with the z-loss beside it, divided by the same N."""
    main = CrossEntropyTerm(name=name, normalizer=normalizer, is_bound=is_bound, constant=constant)
    if z_loss_weight == 0:
        return (main,)
    return (main, ZLossTerm(normalizer=normalizer, factor=z_loss_weight))
