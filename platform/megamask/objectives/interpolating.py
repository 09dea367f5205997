"""Rows in training and the bound, for the objectives with interpolating noise.

The noise and its bound are defined in diffusion/interpolation.py. Shapes: b samples, one row each, s tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megamask.diffusion.corruption import NUM_NOISE_LEVELS
from megamask.diffusion.interpolation import Interpolation, Mixture, interpolate
from megamask.diffusion.philox import Purpose, philox4x32
from megamask.diffusion.schedule import NoiseSchedule
from megamask.models.context import Context
from megamask.models.vocabulary import Vocabulary
from megamask.objectives.base import UNGROUPED, BoundRows, Key, Rows, Samples, never_written
from megamask.objectives.divergence import Noised
from megamask.objectives.documents import document_numbers
from megamask.objectives.masked import bidirectional

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
