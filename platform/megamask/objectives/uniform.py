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

from megamask.diffusion.interpolation import UNIFORM, Mixture
from megamask.diffusion.philox import Purpose, uniform_words
from megamask.models.context import Context
from megamask.models.vocabulary import Vocabulary
from megamask.objectives.base import Key, Reading, Rows, Samples
from megamask.objectives.interpolating import InterpolatingBound, TokenNoise, token_ids
from megamask.objectives.terms import PerEligibleToken, Term, cross_entropy_and_z_loss


@dataclass(frozen=True, kw_only=True)
class UniformObjective(TokenNoise):
    """The NELBO of uniform-state diffusion; settings and errors as of `TokenNoise`."""

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
    def mixture(self) -> Mixture:
        """Random tokens alone."""
        return UNIFORM

    @property
    def bound(self) -> InterpolatingBound:
        """The same divergence over the full range of p."""
        return self.divergence_bound

    @property
    def decoder(self) -> UniformDecoder:
        """Positions in any place; what is not decoded yet holds random tokens."""
        return UniformDecoder(vocabulary=self.vocabulary)

    def rows(self, samples: Samples, step: int, key: Key) -> Rows:
        """Noised rows, scored at every eligible position."""
        return self.divergence_rows(samples, step, key)

    def details(self, samples: Samples, step: int, key: Key) -> list[dict[str, Any]]:
        """Of each sample: t, and the positions that noise wrote."""
        corrupted = self.noise(samples, step, key).is_corrupted
        return [
            {"t": t, "masked": row.nonzero().flatten().tolist()}
            for t, row in zip(self.times(samples, step, key), corrupted, strict=True)
        ]

    def record(self) -> dict[str, Any]:
        """Name, schedule and the mask token's logit; isolated documents where they are."""
        isolation = {"isolate_documents": True} if self.isolate_documents else {}
        return {"name": self.name, "noise_schedule": self.noise_schedule, "mask_logit": self.mask_logit} | isolation


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
