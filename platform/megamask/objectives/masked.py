"""Masked diffusion: some tokens are replaced by the mask token, and each of them is predicted from the others.

The loss is the NELBO, the integral over the mask probability p of (1/p) E[sum over masked i of -log p(x_0,i | x_t)],
estimated by one view of each sample or by a complementary pair. Sources: MDLM (arXiv:2406.07524), MD4
(arXiv:2406.04329), LLaDA (arXiv:2502.09992). The training integral runs over [EPS, 1 - EPS], the bound over all of it.

Shapes: b samples, r = b * views rows, s tokens of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megamask.diffusion.corruption import CorruptedBatch, corrupt, corrupt_exactly
from megamask.diffusion.exact_counts import exact_count_masks, exact_counts
from megamask.diffusion.philox import Purpose, uniform_words
from megamask.diffusion.schedule import (
    NoiseSchedule,
    independent_times,
    least_variance_schedule,
    noise_schedule,
    stratified_times,
    warmed_time,
)
from megamask.diffusion.spindle import corrupt_by_information
from megamask.errors import UsageError
from megamask.models.context import Context
from megamask.models.vocabulary import Vocabulary
from megamask.objectives.base import BoundRows, Key, OnePhase, Reading, Rows, Samples, scored_rows, softmax_without
from megamask.objectives.documents import document_numbers, isolated, places_in_documents, shortened
from megamask.objectives.shapes import ObjectiveShape, shape_of
from megamask.objectives.terms import PerEligibleToken, PerScoredToken, Term, cross_entropy_and_z_loss
from megamask.objectives.weights import BOUNDS, RECIPES, Recipe, position_weights


@dataclass(frozen=True, kw_only=True)
class MaskedObjective(OnePhase):
    """The NELBO of masked diffusion.

    Args:
        noise_schedule: name of a schedule of diffusion/schedule.py.
        complementary: two views of each sample, the second masking what the first leaves visible.
        mask_logit: "excluded" or "included": whether the mask token's logit enters the softmax.
        noise_exponent: of the schedule polynomial.
        weight, cart_p: of a masked position, see weights.py; only training's.
        mask_counts: "independent" masks, or "exact", a number of them that t fixes.
        time_sampling: "stratified" over the global batch, "uniform", each sample by itself, or "importance", stratified
            with the density of `least_variance_schedule`.
        random_length_fraction: part of the samples that is cut to a random length.
        spindle_strength, information: of the schedule spindle, see diffusion/spindle.py; only training needs the
            tokens' information, int64 [V].
        isolate_documents: no position sees another document of its row.
        recipe: a published system's schedule, weight, times and normaliser in place of the ones above; see weights.py.
        z_loss_weight: of the z-loss; it shapes training alone, so it is not part of the record.
        mask_ratio_warmup_steps: of `warmed_time`; only training's.

    Raises:
        UsageError: for a schedule or a choice that does not exist.
    """

    vocabulary: Vocabulary
    noise_schedule: str
    complementary: bool
    mask_logit: str
    noise_exponent: float = 1.0
    weight: str = "nelbo"
    cart_p: float = 0.3
    mask_counts: str = "independent"
    time_sampling: str = "stratified"
    random_length_fraction: float = 0.0
    spindle_strength: float = 0.3
    information: Tensor | None = field(default=None, compare=False, repr=False)
    isolate_documents: bool = False
    recipe: str | None = None
    z_loss_weight: float = 0.0
    mask_ratio_warmup_steps: int = 0

    def __post_init__(self) -> None:
        noise_schedule(self.noise_schedule)
        if self.recipe is not None and (self.recipe not in RECIPES or self.complementary):
            raise UsageError(
                f"objective.recipe is {self.recipe!r} with objective.complementary={self.complementary}; allowed: "
                f"{', '.join(RECIPES)}, each on one view. Nothing was started."
            )
        softmax_without(self.vocabulary, self.mask_logit)

    @property
    def name(self) -> str:
        """As in `objective.name`."""
        return "masked"

    @property
    def num_parts(self) -> int:
        """The loss has one part."""
        return 1

    @property
    def terms(self) -> tuple[Term, ...]:
        """The weighted cross entropy, `nelbo` where it estimates the bound, and the z-loss if it has a weight."""
        recipe = self._recipe
        is_bound = self.weight in BOUNDS and not self._is_spindle if recipe is None else recipe.is_bound
        is_bound = is_bound and self.mask_ratio_warmup_steps == 0
        normalizer: PerEligibleToken | PerScoredToken = PerEligibleToken(num_views=self.shape(1).num_views)
        if recipe is not None and recipe.is_per_scored_token:
            normalizer = PerScoredToken()
        constant = 0.0
        if recipe is not None and recipe.has_reconstruction:
            num_tokens = self.vocabulary.vocab_size - len(self.excluded_ids)
            constant = recipe.schedule.mask_probability(0.0) * math.log(num_tokens)
        name = "nelbo" if is_bound else "masked_cross_entropy"
        return cross_entropy_and_z_loss(name, normalizer, self.z_loss_weight, is_bound=is_bound, constant=constant)

    @property
    def excluded_ids(self) -> frozenset[int]:
        """The mask token, unless its logit is included."""
        return softmax_without(self.vocabulary, self.mask_logit)

    @property
    def bound(self) -> MaskedBound:
        """The exact-count bound over the full range of noise."""
        return MaskedBound(
            mask_token_id=self.vocabulary.mask_token_id, isolated_by=self.vocabulary if self.isolate_documents else None
        )

    @property
    def decoder(self) -> MaskedDecoder:
        """Any masked positions, read in place."""
        return MaskedDecoder()

    def shape(self, sequence_length: int) -> ObjectiveShape:
        """One or two rows of the sample's length; at most every token is scored once."""
        return shape_of(self.record(), sequence_length)

    def seen(self, samples: Samples, key: Key) -> Samples:
        """With documents where they are isolated, and some samples cut to a random length."""
        if self.isolate_documents:
            samples = isolated(samples, self.vocabulary)
        return shortened(samples, self.random_length_fraction, key)

    def context(self, samples: Samples, step: int, key: Key) -> Context:
        """Bidirectional attention, inside a document where the samples name documents."""
        return bidirectional(samples.documents, num_views=self.shape(1).num_views)

    def rows(self, samples: Samples, step: int, key: Key) -> Rows:
        """Masked rows, scored at the masked positions; the noise level is that of the row."""
        noised, times = self._corrupt(samples, step, key), self._times(samples, step, key)
        kind = self.weight if self._recipe is None else self._recipe.weight
        weight = position_weights(
            kind,
            noised,
            samples.is_eligible,
            times,
            self._schedule(samples),
            cart_p=self.cart_p,
        )
        if step <= self.mask_ratio_warmup_steps:
            weight = torch.ones_like(weight)
        return Rows(
            inputs=noised.x_t,
            targets=noised.x_0,
            is_scored=noised.is_masked,
            weight=weight.expand_as(noised.x_0),
            group=noised.noise_level[:, None].expand_as(noised.x_0),
            context=self.context(samples, step, key),
        )

    def details(self, samples: Samples, step: int, key: Key) -> list[dict[str, Any]]:
        """Of each sample: t, and the positions that its first view masks."""
        noised, times = self._corrupt(samples, step, key), self._times(samples, step, key)
        first_views = noised.is_masked[:: self.shape(1).num_views]
        return [
            {"t": t, "masked": is_masked.nonzero().flatten().tolist()}
            for t, is_masked in zip(times, first_views, strict=True)
        ]

    def record(self) -> dict[str, Any]:
        """Name, schedule, views and the mask token's logit; isolated documents where they are."""
        isolation = {"isolate_documents": True} if self.isolate_documents else {}
        return {
            "name": self.name,
            "noise_schedule": self.noise_schedule,
            "complementary": self.complementary,
            "mask_logit": self.mask_logit,
        } | isolation

    @property
    def _recipe(self) -> Recipe | None:
        return None if self.recipe is None else RECIPES[self.recipe]

    def _schedule(self, samples: Samples) -> NoiseSchedule:
        if self._recipe is not None:
            return self._recipe.schedule_of(self.noise_schedule)
        if self.time_sampling == "importance":
            return least_variance_schedule(samples.tokens.size(1))
        return noise_schedule(self.noise_schedule, self.noise_exponent)

    def _corrupt(self, samples: Samples, step: int, key: Key) -> CorruptedBatch:
        noised = self._without_forced_masks(samples, step, key)
        if self._recipe is None or not self._recipe.has_forced_mask:
            return noised
        return _with_a_mask_in_each_row(noised, samples, key, mask_token_id=self.vocabulary.mask_token_id)

    def _without_forced_masks(self, samples: Samples, step: int, key: Key) -> CorruptedBatch:
        if self._is_spindle:
            return self._corrupt_by_information(samples, step, key)
        make = corrupt_exactly if self.mask_counts == "exact" else corrupt
        return make(
            samples.tokens,
            samples.is_eligible,
            samples.sample_index,
            self._times(samples, step, key),
            schedule=self._schedule(samples),
            complementary=self.complementary,
            mask_token_id=self.vocabulary.mask_token_id,
            key=key,
        )

    @property
    def _is_spindle(self) -> bool:
        return self.recipe is None and self.noise_schedule == "spindle"

    def _corrupt_by_information(self, samples: Samples, step: int, key: Key) -> CorruptedBatch:
        if self.information is None:
            raise ValueError("the schedule spindle needs the information of the corpus' tokens")
        return corrupt_by_information(
            samples.tokens,
            samples.is_eligible,
            samples.sample_index,
            self._times(samples, step, key),
            information=self.information,
            strength=self.spindle_strength,
            complementary=self.complementary,
            mask_token_id=self.vocabulary.mask_token_id,
            key=key,
        )

    def _times(self, samples: Samples, step: int, key: Key) -> list[float]:
        is_stratified = self.time_sampling != "uniform" if self._recipe is None else self._recipe.is_stratified
        if is_stratified:
            drawn = stratified_times(step, samples.global_batch_size, key)
            times = [drawn[position] for position in samples.batch_position]
        else:
            times = independent_times(samples.sample_index.tolist(), key)
        return [warmed_time(t, step, self.mask_ratio_warmup_steps) for t in times]


def bidirectional(documents: Tensor | None, num_views: int = 1) -> Context:
    """Attention between all positions of a document, or of a row without documents; int64 [b, s] -> rows [r, s]."""
    if documents is None:
        return Context()
    documents = documents.repeat_interleave(num_views, dim=0)
    return Context(documents=documents, positions=places_in_documents(documents))


def _with_a_mask_in_each_row(
    noised: CorruptedBatch, samples: Samples, key: Key, *, mask_token_id: int
) -> CorruptedBatch:
    """One view, in which a row without masks masks its eligible position with the smallest (word, position)."""
    words = uniform_words(samples.sample_index, noised.x_0.size(1), purpose=Purpose.MASK, key=key)
    first = torch.where(samples.is_eligible, words, 1 << 32).argmin(dim=1, keepdim=True)
    is_first = torch.zeros_like(noised.is_masked).scatter_(1, first, value=True) & samples.is_eligible
    is_masked = torch.where(noised.is_masked.any(dim=1, keepdim=True), noised.is_masked, is_first)
    return replace(noised, is_masked=is_masked, x_t=noised.x_0.masked_fill(is_masked, mask_token_id))


@dataclass(frozen=True, kw_only=True)
class MaskedBound:
    """-log p(x) <= E_k [ n/k * E_mask [ sum over masked of CE ] ], k uniform on 1..n, the mask uniform of that size.

    The any-order form of the bound: the full range of noise, no EPS. LLaDA (arXiv:2502.09992, appendix) spreads the k
    of one set of draws evenly; its rounding is not uniform, ours is integer arithmetic and is.

    Args:
        isolated_by: the vocabulary whose end-of-document id separates documents; None where attention spans the row.
    """

    mask_token_id: int
    isolated_by: Vocabulary | None = None
    is_exact: bool = False

    def scored(self, tokens: Tensor, is_eligible: Tensor) -> Tensor:
        """Every eligible token."""
        return is_eligible

    def draw(
        self, tokens: Tensor, is_scored: Tensor, row_index: Tensor, *, replicate: int, member: int, draws: int, key: Key
    ) -> BoundRows:
        """Rows with k scored tokens masked; scale n / k."""
        num_scored = is_scored.sum(dim=1).clamp(min=1)  # a row without scored tokens masks none and costs nothing
        counts = exact_counts(row_index, num_scored, draws=draws, replicate=replicate, key=key)[member]
        is_masked = exact_count_masks(row_index, is_scored, counts, draw=replicate * draws + member, key=key)
        x_t = torch.where(is_masked, self.mask_token_id, tokens)
        documents = None if self.isolated_by is None else document_numbers(tokens, self.isolated_by)
        return BoundRows(
            rows=scored_rows(x_t, tokens, is_masked, bidirectional(documents)),
            scale=num_scored.to(torch.float64) / counts.to(torch.float64),
        )


@dataclass(frozen=True, kw_only=True)
class MaskedDecoder:
    """Masked positions in any place, read in place."""

    opening: tuple[int, ...] = ()

    def blocks(self, tokens: Tensor, wanted: Tensor, block_length: int | None) -> list[Tensor]:
        """Groups of `block_length` wanted positions from left to right; all in one by default."""
        length = len(wanted) if block_length is None else block_length
        return [wanted[start : start + length] for start in range(0, len(wanted), length)]

    def reading(self, tokens: Tensor, is_open: Tensor) -> Reading:
        """Every open position is read where it is."""
        return Reading(inputs=tokens, context=Context(), is_read=is_open, num_positions=tokens.size(1))
