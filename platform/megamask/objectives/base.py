"""The objective as everything above sees it: the step, the head, evaluation, sampling, inspect and verify.

An objective turns samples into rows: which ids enter the network, which positions are scored against which targets,
and with which weight. It is pure: rows are a function of the samples, the step and the run key, so any rank, layout or
restart makes the same ones, and they are never sent or stored (the noise law).

Shapes: b samples, r = b * views rows, s tokens of a sample, i positions of a row (s, or 2s for a doubled input).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from megamask.errors import UsageError
from megamask.models.context import Context
from megamask.models.vocabulary import Vocabulary
from megamask.objectives.divergence import Noised
from megamask.objectives.shapes import ObjectiveShape
from megamask.objectives.terms import Term

MASK_LOGITS = ("excluded", "included")

UNGROUPED = -1
"""The group of a position that no noise level is reported for."""

Key = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Some samples of a global batch.

    Args:
        tokens: int64 [b, s] clean ids, padding included.
        is_eligible: bool [b, s], tokens that may be corrupted and scored; not padding, not a prompt.
        sample_index: int64 [b], global.
        batch_position: [b] place of each in the global batch.
        global_batch_size: samples of the global batch.
        documents: int64 [b, s] number of each token's document in its row; None means that attention spans the row.
    """

    tokens: Tensor
    is_eligible: Tensor
    sample_index: Tensor
    batch_position: Sequence[int]
    global_batch_size: int
    documents: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of the network and what is scored in them; sample-major, the views of a sample side by side.

    Args:
        inputs: int64 [r, i], what the network reads.
        targets: int64 [r, i], what is scored at each position.
        is_scored: bool [r, i]; a scored position need not be a corrupted one.
        weight: float [r, i], of each scored position's cross entropy.
        group: int64 [r, i], the noise level that a scored position is reported under, or UNGROUPED.
        context: positions, documents and attention.
        part: int64 [r, i], which part of the loss a position belongs to; None where there is one part.
        noised: of interpolating noise, whose positions cost a divergence instead of a cross entropy (divergence.py).
    """

    inputs: Tensor
    targets: Tensor
    is_scored: Tensor
    weight: Tensor
    group: Tensor
    context: Context
    part: Tensor | None = None
    noised: Noised | None = None

    def rows(self, rows: slice | Tensor) -> Rows:
        """Some of the rows, by their place."""
        return Rows(
            inputs=self.inputs[rows],
            targets=self.targets[rows],
            is_scored=self.is_scored[rows],
            weight=self.weight[rows],
            group=self.group[rows],
            context=self.context.rows(rows),
            part=None if self.part is None else self.part[rows],
            noised=None if self.noised is None else self.noised.rows(rows),
        )

    def to(self, device: torch.device) -> Rows:
        """The rows on a device."""
        return Rows(
            inputs=self.inputs.to(device),
            targets=self.targets.to(device),
            is_scored=self.is_scored.to(device),
            weight=self.weight.to(device),
            group=self.group.to(device),
            context=self.context.to(device),
            part=None if self.part is None else self.part.to(device),
            noised=None if self.noised is None else self.noised.to(device),
        )


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A forward pass of the decoder: what the network reads, and where its choices are read.

    Args:
        inputs: int64 [r, i].
        context: of the inputs.
        is_read: bool [r, i]: positions whose logits choose a token, in the order of the tokens wanted.
        num_positions: s, the length of a sample.
        shift: a token's position in the sample, minus the position that its logits are read at.
    """

    inputs: Tensor
    context: Context
    is_read: Tensor
    num_positions: int
    shift: int = 0

    def to(self, device: torch.device) -> Reading:
        """The reading on a device."""
        return replace(
            self, inputs=self.inputs.to(device), context=self.context.to(device), is_read=self.is_read.to(device)
        )


@dataclass(frozen=True, kw_only=True)
class BoundRows:
    """Rows of one draw of a bound.

    Args:
        rows: what to score; the weighted sum of a row is its sample's estimate up to `scale`.
        scale: float64 [b], or None for 1.
    """

    rows: Rows
    scale: Tensor | None = None


class Bound(Protocol):
    """Bound that evaluation computes: always an upper bound on the negative log-likelihood, for any training loss."""

    @property
    def is_exact(self) -> bool:
        """True if one draw gives the negative log-likelihood itself."""

    def scored(self, tokens: Tensor, is_eligible: Tensor) -> Tensor:
        """Bool [b, s]: the tokens whose cost is counted. Shapes: tokens int64 [b, s], is_eligible bool [b, s]."""

    def draw(
        self, tokens: Tensor, is_scored: Tensor, row_index: Tensor, *, replicate: int, member: int, draws: int, key: Key
    ) -> BoundRows:
        """The rows of one draw, one row a sample; unbiased for the bound over a uniform key.

        Args:
            tokens: int64 [b, s]. is_scored: bool [b, s], as `scored` gives it. row_index: int64 [b].
            replicate, member: which draw of `draws` in which replicate.
        """


class Decoder(Protocol):
    """An objective as sampling uses it."""

    @property
    def opening(self) -> tuple[int, ...]:
        """Replacement of an empty prompt."""

    def blocks(self, tokens: Tensor, wanted: Tensor, block_length: int | None) -> list[Tensor]:
        """The wanted positions (int64 [w], ascending) of a row [s] in groups that are finished one after another.

        Raises:
            UsageError: this objective cannot fill these positions, or not in blocks of that length.
        """

    def reading(self, tokens: Tensor, is_open: Tensor) -> Reading:
        """The forward pass that chooses tokens for the open positions. Shapes: int64 and bool [r, s]."""


class Objective(Protocol):
    """Terms of the loss that is minimised."""

    @property
    def name(self) -> str:
        """As in `objective.name`."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The ids that it knows."""

    @property
    def terms(self) -> Sequence[Term]:
        """The sums that make up the loss."""

    @property
    def num_parts(self) -> int:
        """Parts of the loss that `Rows.part` numbers."""

    @property
    def needs_mask_token(self) -> bool:
        """True if its rows or its decoder contain the mask token."""

    @property
    def excluded_ids(self) -> frozenset[int]:
        """Ids that never enter the softmax, beside the columns that pad the vocabulary."""

    @property
    def bound(self) -> Bound:
        """Bound that evaluation computes."""

    @property
    def decoder(self) -> Decoder:
        """Decoder that sampling uses."""

    def at(self, step: int) -> Objective:
        """The objective of a step (from 1); another one only where phases differ (phases.py)."""

    def seen(self, samples: Samples, key: Key) -> Samples:
        """The samples as the objective takes them: which tokens are eligible, where documents begin."""

    def shape(self, sequence_length: int) -> ObjectiveShape:
        """Sizes of a step, in integers."""

    def context(self, samples: Samples, step: int, key: Key) -> Context:
        """Return the context that every pipeline stage needs; made without token ids."""

    def rows(self, samples: Samples, step: int, key: Key) -> Rows:
        """Return the input of the first and the last pipeline stage: the rows of these samples at a step (from 1)."""

    def details(self, samples: Samples, step: int, key: Key) -> list[dict[str, Any]]:
        """Return the facts of each sample that inspect shows, in JSON types."""

    def record(self) -> dict[str, Any]:
        """Return the settings for model.json that sampling, evaluation and conversion need, in JSON types."""


class OnePhase:
    """Base of a diffusion objective that is the same at all steps and takes samples as they are."""

    __slots__ = ()

    @property
    def needs_mask_token(self) -> bool:
        """Masks are noise, or fill the places of tokens that are not decoded yet."""
        return True

    def at(self, step: int) -> Self:
        """The objective itself, at every step."""
        del step
        return self

    def seen(self, samples: Samples, key: Key) -> Samples:
        """The samples, unchanged."""
        del key
        return samples


def never_written(vocabulary: Vocabulary) -> frozenset[int]:
    """Ids that no decoder ever writes and that take no part in its probabilities."""
    return frozenset((vocabulary.mask_token_id, vocabulary.pad_token_id))


def is_excluded(ids: Tensor, vocabulary: Vocabulary, excluded: frozenset[int]) -> Tensor:
    """Bool, of the shape of ids: columns that take no part in a softmax, those that pad the vocabulary among them."""
    outside = ids >= vocabulary.vocab_size
    for token in sorted(excluded):
        outside = outside | (ids == token)
    return outside


def filled_up(rows: Rows, num_rows: int) -> Rows:
    """The rows, followed by copies in which nothing is scored, so that every pass has one shape."""
    if num_rows == 0:
        return rows
    num_given = len(rows.inputs)
    order = torch.arange(num_given + num_rows, device=rows.inputs.device)
    filled = rows.rows(order % num_given)  # an index makes copies, so the given rows keep theirs
    filled.is_scored[num_given:] = False
    return filled


def scored_rows(inputs: Tensor, targets: Tensor, is_scored: Tensor, context: Context | None = None) -> Rows:
    """Rows of weight 1 outside any noise level. Shapes: all [r, i]."""
    return Rows(
        inputs=inputs,
        targets=targets,
        is_scored=is_scored,
        weight=torch.ones((), device=inputs.device).expand_as(inputs),
        group=torch.full((), UNGROUPED, device=inputs.device).expand_as(inputs),
        context=context or Context(),
    )


def softmax_without(vocabulary: Vocabulary, mask_logit: str) -> frozenset[int]:
    """Ids outside the softmax: the mask token, unless its logit is included.

    Args:
        mask_logit: "excluded" or "included".

    Raises:
        UsageError: any other choice.
    """
    if mask_logit not in MASK_LOGITS:
        raise UsageError(
            f"objective.mask_logit is {mask_logit!r}; allowed: {', '.join(MASK_LOGITS)}. Nothing was started."
        )
    return frozenset((vocabulary.mask_token_id,)) if mask_logit == "excluded" else frozenset()
