"""A bound in which first tokens are given, so that likelihoods with and without a diffusion are of the same tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megamask.models.context import first_tokens
from megamask.models.vocabulary import Vocabulary
from megamask.objectives.base import Bound, BoundRows, Key, Objective
from megamask.objectives.documents import document_numbers


@dataclass(frozen=True, kw_only=True)
class GivenFirst:
    """A bound in which first tokens are given: it scores what an autoregressive model scores.

    Args:
        isolated_by: as of `ExactLikelihood`; the first token of each document is given too.
    """

    bound: Bound
    isolated_by: Vocabulary | None = None

    @property
    def is_exact(self) -> bool:
        """As of the bound."""
        return self.bound.is_exact

    def scored(self, tokens: Tensor, is_eligible: Tensor) -> Tensor:
        """The tokens that the bound scores, but for those that nothing is before."""
        documents = None if self.isolated_by is None else document_numbers(tokens, self.isolated_by)
        return with_a_past(self.bound.scored(tokens, is_eligible), documents)

    def draw(
        self, tokens: Tensor, is_scored: Tensor, row_index: Tensor, *, replicate: int, member: int, draws: int, key: Key
    ) -> BoundRows:
        """The bound's draw, of the tokens that are left."""
        return self.bound.draw(tokens, is_scored, row_index, replicate=replicate, member=member, draws=draws, key=key)


def given_first(bound: Bound, objective: Objective) -> GivenFirst:
    """The bound of an objective with first tokens given, of each document too where documents are isolated."""
    is_isolated = bool(objective.record().get("isolate_documents", False))
    return GivenFirst(bound=bound, isolated_by=objective.vocabulary if is_isolated else None)


def with_a_past(is_eligible: Tensor, documents: Tensor | None) -> Tensor:
    """The eligible tokens that have a token before them in their row, and in their document. Shapes: bool [b, s]."""
    is_scored = is_eligible.clone()
    is_scored[:, 0] = False
    return is_scored if documents is None else is_scored & ~first_tokens(documents)
