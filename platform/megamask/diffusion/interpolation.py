"""Interpolating noise: a token stays, or becomes the mask token, or a uniformly random token.

At corruption probability p a token x becomes z with q(z|x) = (1 - p) [z = x] + p rho/K [z is a token] + p (1 - rho)
[z is the mask token], K tokens. rho = 1 everywhere is D3PM's uniform noise; rho = sigmoid(a * lambda + b) with the
log-SNR lambda = log((1 - p)/p) turns from random tokens at little noise to masks at much (a = 0: a fixed mixture;
b to minus infinity: masks alone). A process that forgets where it came from jumps to z at the rate

    r(z) = (rho - a rho (1 - rho)) / ((1 - p) K) for a token, ((1 - rho) + a rho (1 - rho)) / (1 - p) for the mask,

per unit of p, and with alpha = 1 - p the negative log-likelihood is at most the integral over p in (0, 1) of

    E over z of r(z)/q(z|x) * (KL(q(.|x) || q(.|x_theta)) + I(q(z|x) / q(z|x_theta))),   I(y) = y - log y - 1.

Sources: D3PM, arXiv:2107.03006; the bound: GIDD, arXiv:2503.04482, theorem 3.2; by log-SNR: arXiv:2512.10858. Rates are
not negative for 0 <= a <= 1.

Shapes: b rows, s tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megamask.diffusion.philox import Purpose, uniform_words
from megamask.diffusion.schedule import threshold


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Kinds of noise that a corrupted token becomes.

    Args:
        slope, shift: a and b of rho; a in [0, 1]. A shift of infinity is uniform noise alone.
    """

    slope: float
    shift: float

    def uniform_share(self, p: float) -> float:
        """rho at p in (0, 1)."""
        if math.isinf(self.shift):
            return 1.0 if self.shift > 0 else 0.0
        exponent = self.slope * math.log((1 - p) / p) + self.shift
        return 1 / (1 + math.exp(-exponent)) if exponent > -700 else 0.0


UNIFORM = Mixture(slope=0.0, shift=math.inf)


@dataclass(frozen=True, kw_only=True)
class Interpolation:
    """Noised rows and what the bound needs of them; all [b, s].

    Args:
        x_t: int64.
        is_corrupted: bool, where x_t was drawn anew; a random token may be the old one.
        rate: float32 r(z)/q(z|x), per unit of p.
        alpha: float32 1 - p. token_mass: float32 p rho/K.
    """

    x_t: Tensor
    is_corrupted: Tensor
    rate: Tensor
    alpha: Tensor
    token_mass: Tensor


def interpolate(
    x_0: Tensor,
    is_eligible: Tensor,
    index: Tensor,
    probabilities: Sequence[float],
    *,
    mixture: Mixture,
    token_ids: Tensor,
    mask_token_id: int,
    key: tuple[int, int],
    purposes: tuple[Purpose, Purpose] = (Purpose.MASK, Purpose.RANDOM_TOKEN),
    draw: int = 0,
) -> Interpolation:
    """Noises rows by the noise law.

    With u_pos of the first purpose, a position is corrupted where u_pos < floor(p * 2^32). Words 2 pos and 2 pos + 1 of
    the second purpose decide: a random token where the first is below floor(rho * 2^32), and then the one at place
    (second * K div 2^32) of `token_ids`; else the mask token.

    Args:
        x_0: int64 [b, s]. is_eligible: bool [b, s]; other positions stay.
        index: int64 [b], that the noise law asks for. probabilities: p of each row, in (0, 1).
        token_ids: int64 [K], ascending, the tokens that noise may write.
    """
    num_tokens, device = len(token_ids), x_0.device
    length = x_0.size(1)

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)[:, None]

    def limits(values: Sequence[float]) -> Tensor:
        return torch.tensor([threshold(value) for value in values], dtype=torch.int64, device=device)[:, None]

    shares = [mixture.uniform_share(p) for p in probabilities]
    is_corrupted = is_eligible & (
        uniform_words(index, length, purpose=purposes[0], key=key, draw=draw) < limits(probabilities)
    )
    words = uniform_words(index, 2 * length, purpose=purposes[1], key=key, draw=draw)
    is_random = words[:, ::2] < limits(shares)
    random_token = token_ids[words[:, 1::2] * num_tokens >> 32]
    noise = torch.where(is_random, random_token, mask_token_id)
    x_t = torch.where(is_corrupted, noise, x_0)

    p, rho = column(probabilities), column(shares)
    curve = mixture.slope * rho * (1 - rho)
    token_mass, mask_mass = p * rho / num_tokens, p * (1 - rho)
    token_rate, mask_rate = (rho - curve) / ((1 - p) * num_tokens), ((1 - rho) + curve) / (1 - p)
    tiny = torch.finfo(torch.float64).tiny
    rate = torch.where(
        x_t == mask_token_id,
        mask_rate / mask_mass.clamp(min=tiny),
        token_rate / torch.where(x_t == x_0, 1 - p + token_mass, token_mass.clamp(min=tiny)),
    )
    return Interpolation(
        x_t=x_t,
        is_corrupted=is_corrupted,
        rate=rate.to(torch.float32),
        alpha=(1 - p).to(torch.float32).expand_as(x_0),
        token_mass=token_mass.to(torch.float32).expand_as(x_0),
    )
