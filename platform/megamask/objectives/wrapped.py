"""An objective made from another one: everything is the inner objective's unless a subclass replaces it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megamask.models.context import Context
from megamask.models.vocabulary import Vocabulary
from megamask.objectives.base import Bound, Decoder, Key, Objective, Rows, Samples
from megamask.objectives.shapes import ObjectiveShape
from megamask.objectives.terms import Term


@dataclass(frozen=True, kw_only=True)
class Wrapped:
    """The inner objective, in all its parts."""

    inner: Objective

    @property
    def name(self) -> str:
        """As in `objective.name`."""
        return self.inner.name

    @property
    def vocabulary(self) -> Vocabulary:
        """The ids that it knows."""
        return self.inner.vocabulary

    @property
    def terms(self) -> Sequence[Term]:
        """The sums that make up the loss."""
        return self.inner.terms

    @property
    def num_parts(self) -> int:
        """Parts of the loss that `Rows.part` numbers."""
        return self.inner.num_parts

    @property
    def needs_mask_token(self) -> bool:
        """True if rows or decoder contain the mask token."""
        return self.inner.needs_mask_token

    @property
    def excluded_ids(self) -> frozenset[int]:
        """Ids that never enter the softmax."""
        return self.inner.excluded_ids

    @property
    def bound(self) -> Bound:
        """Bound that evaluation computes."""
        return self.inner.bound

    @property
    def decoder(self) -> Decoder:
        """Decoder of sampling."""
        return self.inner.decoder

    def at(self, step: int) -> Objective:
        """The objective of a step, wrapped alike."""
        return replace(self, inner=self.inner.at(step))

    def seen(self, samples: Samples, key: Key) -> Samples:
        """The samples as the inner objective sees them."""
        return self.inner.seen(samples, key)

    def shape(self, sequence_length: int) -> ObjectiveShape:
        """Sizes of a step, in integers."""
        return self.inner.shape(sequence_length)

    def context(self, samples: Samples, step: int, key: Key) -> Context:
        """Context that every pipeline stage needs."""
        return self.inner.context(samples, step, key)

    def rows(self, samples: Samples, step: int, key: Key) -> Rows:
        """The rows of these samples at a step (from 1)."""
        return self.inner.rows(samples, step, key)

    def details(self, samples: Samples, step: int, key: Key) -> list[dict[str, Any]]:
        """Facts that inspect shows of each sample."""
        return self.inner.details(samples, step, key)

    def record(self) -> dict[str, Any]:
        """Facts that sampling, evaluation and conversion need."""
        return self.inner.record()
