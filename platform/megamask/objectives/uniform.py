"""Uniform-state diffusion: tokens become random tokens, and the network must find out which, and put them right.

At corruption probability p each eligible token is replaced by a uniformly random one with probability p. All eligible
positions are scored, because nothing marks the corrupted ones; the cost of a position is a divergence between the
noise's posterior under the true token and under the network's prediction (divergence.py), and the loss is the NELBO.

Sources: D3PM-uniform, arXiv:2107.03006; the continuous-time bound: GIDD, arXiv:2503.04482, theorem 3.2 with uniform
noise alone, which is UDLM's (arXiv:2412.10193).

Shapes: b samples, one row each, s tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megamask.diffusion.interpolation import UNIFORM, Interpolation, Mixture
from megamask.diffusion.philox import Purpose, uniform_words
from megamask.diffusion.schedule import noise_schedule, stratified_times
from megamask.models.context import Context
from megamask.models.vocabulary import Vocabulary
from megamask.objectives.base import Key, OnePhase, Reading, Rows, Samples, softmax_without
from megamask.objectives.documents import isolated
from megamask.objectives.interpolating import InterpolatingBound, noise_rows, token_ids, training_rows
from megamask.objectives.masked import bidirectional
from megamask.objectives.shapes import ObjectiveShape, shape_of
from megamask.objectives.terms import PerEligibleToken, Term, cross_entropy_and_z_loss


@dataclass(frozen=True, kw_only=True)
class UniformObjective(OnePhase):
    """The NELBO of uniform-state diffusion.

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
    def name(self) -> str:
        """As in `objective.name`."""
        return "uniform"

    @property
    def num_parts(self) -> int:
        """The loss has one part."""
        return 1

    @property
    def terms(self) -> tuple[Term, ...]:
        """The NELBO per eligible token, and the z-loss if it has a weight."""
        return cross_entropy_and_z_loss("nelbo", PerEligibleToken(num_views=1), self.z_loss_weight)

    @property
    def excluded_ids(self) -> frozenset[int]:
        """The mask token, unless its logit is included."""
        return softmax_without(self.vocabulary, self.mask_logit)

    @property
    def bound(self) -> InterpolatingBound:
        """The same divergence over the full range of p."""
        return InterpolatingBound(
            vocabulary=self.vocabulary, mixture=self._mixture, isolate_documents=self.isolate_documents
        )

    @property
    def decoder(self) -> UniformDecoder:
        """Positions in any place; what is not decoded yet holds random tokens."""
        return UniformDecoder(vocabulary=self.vocabulary)

    def shape(self, sequence_length: int) -> ObjectiveShape:
        """One row of the sample's length, scored everywhere."""
        return shape_of(self.record(), sequence_length)

    def seen(self, samples: Samples, key: Key) -> Samples:
        """With documents where they are isolated."""
        return isolated(samples, self.vocabulary) if self.isolate_documents else samples

    def context(self, samples: Samples, step: int, key: Key) -> Context:
        """Bidirectional attention, inside a document where the samples name documents."""
        return bidirectional(samples.documents)

    def rows(self, samples: Samples, step: int, key: Key) -> Rows:
        """Noised rows, scored at every eligible position; only corrupted ones have a noise level."""
        schedule, times = noise_schedule(self.noise_schedule, self.noise_exponent), self._times(samples, step, key)
        return training_rows(
            self._noise(samples, step, key), samples, times, schedule, self.context(samples, step, key)
        )

    def details(self, samples: Samples, step: int, key: Key) -> list[dict[str, Any]]:
        """Of each sample: t, and the positions that noise wrote."""
        corrupted = self._noise(samples, step, key).is_corrupted
        return [
            {"t": t, "masked": row.nonzero().flatten().tolist()}
            for t, row in zip(self._times(samples, step, key), corrupted, strict=True)
        ]

    def record(self) -> dict[str, Any]:
        """Name, schedule and the mask token's logit; isolated documents where they are."""
        isolation = {"isolate_documents": True} if self.isolate_documents else {}
        return {"name": self.name, "noise_schedule": self.noise_schedule, "mask_logit": self.mask_logit} | isolation

    @property
    def _mixture(self) -> Mixture:
        return UNIFORM

    def _times(self, samples: Samples, step: int, key: Key) -> list[float]:
        times = stratified_times(step, samples.global_batch_size, key)
        return [times[position] for position in samples.batch_position]

    def _noise(self, samples: Samples, step: int, key: Key) -> Interpolation:
        schedule = noise_schedule(self.noise_schedule, self.noise_exponent)
        probabilities = [schedule.mask_probability(t) for t in self._times(samples, step, key)]
        return noise_rows(samples, probabilities, self.vocabulary, self._mixture, key)


@dataclass(frozen=True, kw_only=True)
class UniformDecoder:
    """Any positions, read in place; an open position holds a random token, as noise would have left it.

    As many positions are noise as are open, so that the network reads rows of the noise level it was trained on.
    """

    vocabulary: Vocabulary
    opening: tuple[int, ...] = ()

    def blocks(self, tokens: Tensor, wanted: Tensor, block_length: int | None) -> list[Tensor]:
        """Groups of `block_length` wanted positions from left to right; all in one by default."""
        length = len(wanted) if block_length is None else block_length
        return [wanted[start : start + length] for start in range(0, len(wanted), length)]

    def reading(self, tokens: Tensor, is_open: Tensor) -> Reading:
        """Every open position is read where it is; each mask id of the row is replaced by a random token."""
        ids = token_ids(self.vocabulary, tokens.device)
        words = uniform_words(is_open.sum(dim=1), tokens.size(1), purpose=Purpose.UNDECODED, key=(0, 0))
        noise = ids[words * len(ids) >> 32]
        inputs = torch.where(tokens == self.vocabulary.mask_token_id, noise, tokens)
        return Reading(inputs=inputs, context=Context(), is_read=is_open, num_positions=tokens.size(1))
