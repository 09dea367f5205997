"""Base, rows in training and bound of the objectives whose noise writes random tokens.

The noise and its bound are defined in diffusion/interpolation.py. Shapes: b samples, one row each, s tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megamask.diffusion.corruption import NUM_NOISE_LEVELS
from megamask.diffusion.interpolation import Interpolation, Mixture, interpolate
from megamask.diffusion.philox import Purpose, philox4x32
from megamask.diffusion.schedule import NoiseSchedule, noise_schedule, stratified_times
from megamask.models.context import Context
from megamask.models.vocabulary import Vocabulary
from megamask.objectives.base import (
    UNGROUPED,
    BoundRows,
    Key,
    OnePhase,
    Rows,
    Samples,
    never_written,
    softmax_without,
)
from megamask.objectives.divergence import Noised
from megamask.objectives.documents import document_numbers, isolated
from megamask.objectives.masked import bidirectional
from megamask.objectives.shapes import ObjectiveShape, shape_of

_NEAR_THE_ENDS = 2.0**-40
"""The bound's integral leaves out as much of (0, 1) at both ends: less than 1e-10 nats per token."""


def token_ids(vocabulary: Vocabulary, device: torch.device) -> Tensor:
    """The ids that noise may write, ascending: all but mask and padding."""
    never = never_written(vocabulary)
    return torch.tensor([token for token in range(vocabulary.vocab_size) if token not in never], device=device)


def noise_rows(
    samples: Samples, probabilities: Sequence[float], vocabulary: Vocabulary, mixture: Mixture, key: Key
) -> Interpolation:
    """The samples under training's noise."""
    return interpolate(
        samples.tokens,
        samples.is_eligible,
        samples.sample_index,
        probabilities,
        mixture=mixture,
        token_ids=token_ids(vocabulary, samples.tokens.device),
        mask_token_id=vocabulary.mask_token_id,
        key=key,
    )


def training_rows(
    noise: Interpolation, samples: Samples, times: Sequence[float], schedule: NoiseSchedule, context: Context
) -> Rows:
    """Rows scored at every eligible position with weight p'(t) * rate; only corrupted ones have a noise level."""
    device = samples.tokens.device
    slopes = torch.tensor([schedule.derivative(t) for t in times], dtype=torch.float32, device=device)[:, None]
    levels = torch.tensor(
        [min(int(schedule.mask_probability(t) * NUM_NOISE_LEVELS), NUM_NOISE_LEVELS - 1) for t in times], device=device
    )
    return Rows(
        inputs=noise.x_t,
        targets=samples.tokens,
        is_scored=samples.is_eligible,
        weight=slopes * noise.rate,
        group=torch.where(noise.is_corrupted, levels[:, None], UNGROUPED),
        context=context,
        noised=Noised(alpha=noise.alpha, token_mass=noise.token_mass),
    )


@dataclass(frozen=True, kw_only=True)
class InterpolatingBound:
    """The integral of the divergence over the full range of p, stratified over the draws of a replicate.

    u = 53 bits of philox((i mod 2^32, i div 2^32, 0, 10 + 256 r), key); draw j of b has p = frac(u + j/b). Corruption
    has purpose 9, the random tokens 14, both with draw r * b + j.
    """

    vocabulary: Vocabulary
    mixture: Mixture
    isolate_documents: bool = False
    is_exact: bool = False

    def scored(self, tokens: Tensor, is_eligible: Tensor) -> Tensor:
        """Every eligible token."""
        return is_eligible

    def draw(
        self, tokens: Tensor, is_scored: Tensor, row_index: Tensor, *, replicate: int, member: int, draws: int, key: Key
    ) -> BoundRows:
        """Rows noised at p, each scored token with weight rate."""
        counter = (row_index & 0xFFFFFFFF, row_index >> 32, 0, int(Purpose.VALIDATION_TIME) + 256 * replicate)
        words = philox4x32(counter, key)
        u = (words[0] * 2**21 + words[1] // 2**11).to(torch.float64) * 2.0**-53
        p = ((u + member / draws) % 1.0).clamp(_NEAR_THE_ENDS, 1 - _NEAR_THE_ENDS)
        noise = interpolate(
            tokens,
            is_scored,
            row_index,
            p.tolist(),
            mixture=self.mixture,
            token_ids=token_ids(self.vocabulary, tokens.device),
            mask_token_id=self.vocabulary.mask_token_id,
            key=key,
            purposes=(Purpose.VALIDATION_MASK, Purpose.VALIDATION_RANDOM_TOKEN),
            draw=replicate * draws + member,
        )
        documents = document_numbers(tokens, self.vocabulary) if self.isolate_documents else None
        return BoundRows(
            rows=Rows(
                inputs=noise.x_t,
                targets=tokens,
                is_scored=is_scored,
                weight=noise.rate,
                group=torch.full((), UNGROUPED, device=tokens.device).expand_as(tokens),
                context=bidirectional(documents),
                noised=Noised(alpha=noise.alpha, token_mass=noise.token_mass),
            )
        )


@dataclass(frozen=True, kw_only=True)
class TokenNoise(OnePhase):
    """Base of an objective whose noise writes random tokens: one view, one row of the sample's length.

    A subclass has a name, terms, a decoder and a record.

    Args:
        noise_schedule, noise_exponent: how p depends on t, as for masked diffusion.
        isolate_documents: no position sees another document of its row.
        z_loss_weight: of the z-loss; it shapes training alone, so it is not part of the record.

    Raises:
        UsageError: for a schedule or a choice that does not exist.
    """

    vocabulary: Vocabulary
    noise_schedule: str
    mask_logit: str
    noise_exponent: float = 1.0
    isolate_documents: bool = False
    z_loss_weight: float = 0.0

    def __post_init__(self) -> None:
        noise_schedule(self.noise_schedule)
        softmax_without(self.vocabulary, self.mask_logit)

    @property
    def excluded_ids(self) -> frozenset[int]:
        """The mask token, unless its logit is included."""
        return softmax_without(self.vocabulary, self.mask_logit)

    @property
    def divergence_bound(self) -> InterpolatingBound:
        """The divergence over the full range of p."""
        return InterpolatingBound(
            vocabulary=self.vocabulary, mixture=self.mixture, isolate_documents=self.isolate_documents
        )

    @property
    def mixture(self) -> Mixture:
        """Share of masks and of random tokens in what noise writes."""
        raise NotImplementedError

    def record(self) -> dict[str, Any]:
        """Settings that sampling, evaluation and conversion need."""
        raise NotImplementedError

    def shape(self, sequence_length: int) -> ObjectiveShape:
        """One row of the sample's length."""
        return shape_of(self.record(), sequence_length)

    def seen(self, samples: Samples, key: Key) -> Samples:
        """With documents where they are isolated."""
        return isolated(samples, self.vocabulary) if self.isolate_documents else samples

    def context(self, samples: Samples, step: int, key: Key) -> Context:
        """Bidirectional attention, inside a document where the samples name documents."""
        return bidirectional(samples.documents)

    def divergence_rows(self, samples: Samples, step: int, key: Key) -> Rows:
        """Noised rows, all eligible positions scored by a divergence; only corrupted ones have a noise level."""
        return training_rows(
            self.noise(samples, step, key),
            samples,
            self.times(samples, step, key),
            self.schedule,
            self.context(samples, step, key),
        )

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule."""
        return noise_schedule(self.noise_schedule, self.noise_exponent)

    def times(self, samples: Samples, step: int, key: Key) -> list[float]:
        """The noise level t of each sample."""
        times = stratified_times(step, samples.global_batch_size, key)
        return [times[position] for position in samples.batch_position]

    def noise(self, samples: Samples, step: int, key: Key) -> Interpolation:
        """The samples under the step's noise."""
        probabilities = [self.schedule.mask_probability(t) for t in self.times(samples, step, key)]
        return noise_rows(samples, probabilities, self.vocabulary, self.mixture, key)
