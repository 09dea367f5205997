"""Masked diffusion: some tokens are replaced by the mask token, and each of them is predicted from the others.

The loss is the NELBO, the integral over the mask probability p of (1/p) E[sum over masked i of -log p(x_0,i | x_t)],
estimated by one view of each sample or by a complementary pair. Sources: MDLM (arXiv:2406.07524), MD4
(arXiv:2406.04329), LLaDA (arXiv:2502.09992). The training integral runs over [EPS, 1 - EPS], the bound over all of it.

Shapes: b samples, r = b * views rows, s tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megamask.diffusion.corruption import CorruptedBatch, corrupt
from megamask.diffusion.exact_counts import exact_count_masks, exact_counts
from megamask.diffusion.schedule import noise_schedule, stratified_times
from megamask.models.context import Context
from megamask.models.vocabulary import Vocabulary
from megamask.objectives.base import BoundRows, Key, Reading, Rows, Samples, scored_rows, softmax_without
from megamask.objectives.shapes import ObjectiveShape, shape_of
from megamask.objectives.terms import PerEligibleToken, Term, cross_entropy_and_z_loss


@dataclass(frozen=True, kw_only=True)
class MaskedObjective:
    """The NELBO of masked diffusion.

    Args:
        noise_schedule: name of a schedule of diffusion/schedule.py.
        complementary: two views of each sample, the second masking what the first leaves visible.
        mask_logit: "excluded" or "included": whether the mask token's logit enters the softmax.
        z_loss_weight: of the z-loss; it shapes training alone, so it is not part of the record.

    Raises:
        UsageError: for a schedule or a choice that does not exist.
    """

    vocabulary: Vocabulary
    noise_schedule: str
    complementary: bool
    mask_logit: str
    z_loss_weight: float = 0.0

    def __post_init__(self) -> None:
        noise_schedule(self.noise_schedule)
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
        """The NELBO per eligible token and view, and the z-loss if it has a weight."""
        num_views = self.shape(1).num_views
        return cross_entropy_and_z_loss("nelbo", PerEligibleToken(num_views=num_views), self.z_loss_weight)

    @property
    def excluded_ids(self) -> frozenset[int]:
        """The mask token, unless its logit is included."""
        return softmax_without(self.vocabulary, self.mask_logit)

    @property
    def bound(self) -> MaskedBound:
        """The exact-count bound over the full range of noise."""
        return MaskedBound(mask_token_id=self.vocabulary.mask_token_id)

    @property
    def decoder(self) -> MaskedDecoder:
        """Any masked positions, read in place."""
        return MaskedDecoder()

    def shape(self, sequence_length: int) -> ObjectiveShape:
        """One or two rows of the sample's length; at most every token is scored once."""
        return shape_of(self.record(), sequence_length)

    def context(self, samples: Samples, step: int, key: Key) -> Context:
        """Bidirectional attention."""
        return Context()

    def rows(self, samples: Samples, step: int, key: Key) -> Rows:
        """Masked rows, scored at the masked positions; the weight and the noise level are those of the row."""
        noised = self._corrupt(samples, step, key)
        return Rows(
            inputs=noised.x_t,
            targets=noised.x_0,
            is_scored=noised.is_masked,
            weight=noised.weight[:, None].expand_as(noised.x_0),
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
        """Name, schedule, views and the mask token's logit."""
        return {
            "name": self.name,
            "noise_schedule": self.noise_schedule,
            "complementary": self.complementary,
            "mask_logit": self.mask_logit,
        }

    def _corrupt(self, samples: Samples, step: int, key: Key) -> CorruptedBatch:
        return corrupt(
            samples.tokens,
            samples.is_eligible,
            samples.sample_index,
            self._times(samples, step, key),
            schedule=noise_schedule(self.noise_schedule),
            complementary=self.complementary,
            mask_token_id=self.vocabulary.mask_token_id,
            key=key,
        )

    def _times(self, samples: Samples, step: int, key: Key) -> list[float]:
        times = stratified_times(step, samples.global_batch_size, key)
        return [times[position] for position in samples.batch_position]


@dataclass(frozen=True, kw_only=True)
class MaskedBound:
    """-log p(x) <= E_k [ n/k * E_mask [ sum over masked of CE ] ], k uniform on 1..n, the mask uniform of that size.

    The any-order form of the bound: the full range of noise, no EPS. LLaDA (arXiv:2502.09992, appendix) spreads the k
    of one set of draws evenly; its rounding is not uniform, ours is integer arithmetic and is.
    """

    mask_token_id: int
    is_exact: bool = False

    def scored(self, is_eligible: Tensor) -> Tensor:
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
        return BoundRows(
            rows=scored_rows(x_t, tokens, is_masked), scale=num_scored.to(torch.float64) / counts.to(torch.float64)
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
