"""The cost of a position under interpolating noise, in plain torch: what the engine's sharded version computes too.

With q = alpha * p_theta + c on each token that noise may write (c = `token_mass`, 0 on the others) and r the same for
the true token, the cost is KL(r || q) + I(r_z / q_z), where z is what the network read and I(y) = y - log y - 1 is left
out for the mask token. Both are written as sums of terms that are not negative, with d = (q - r)/r,

    KL = sum over y of r (d - log(1 + d)),  I = log(1 + d_z) - d_z/(1 + d_z),

so that nothing cancels where alpha is small. Source: GIDD, arXiv:2503.04482, theorem 3.2.

Shapes: m scored positions, v columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MIN_RATIO = 1e-30
"""Of q to r: a probability that float32 cannot hold still has a finite cost."""


@dataclass(frozen=True, kw_only=True)
class Noised:
    """Noise of the scored positions of some rows; [r, i] in rows, [m] once they are chosen.

    Args:
        alpha: float32, the probability that noise left the token alone.
        token_mass: float32, the probability that noise wrote a given token.
    """

    alpha: Tensor
    token_mass: Tensor

    def rows(self, rows: slice | Tensor) -> Noised:
        """The noise of some rows, by their place."""
        return Noised(alpha=self.alpha[rows], token_mass=self.token_mass[rows])

    def columns(self, places: Tensor) -> Noised:
        """The noise of some positions of every row, int64 [c]."""
        return Noised(alpha=self.alpha[:, places], token_mass=self.token_mass[:, places])

    def to(self, device: torch.device) -> Noised:
        """The same on a device."""
        return Noised(alpha=self.alpha.to(device), token_mass=self.token_mass.to(device))


def divergence(
    log_probabilities: Tensor, targets: Tensor, read: Tensor, noised: Noised, can_be_noise: Tensor
) -> Tensor:
    """The cost of each position in nats, float [m].

    Args:
        log_probabilities: float [m, v]; -inf for ids outside the softmax.
        targets: int64 [m], the true ids. read: int64 [m], what the network read there.
        noised: of the positions, each [m].
        can_be_noise: bool [v], the ids that noise may write.
    """
    p_theta = log_probabilities.exp()
    column = torch.arange(p_theta.size(1), device=p_theta.device)
    is_target, is_read = column == targets[:, None], column == read[:, None]
    alpha, mass = noised.alpha[:, None], noised.token_mass[:, None] * can_be_noise
    r = mass + alpha * is_target
    has_mass = r > 0
    safe = torch.where(has_mass, r, 1.0)
    d = alpha * (p_theta - is_target.to(p_theta.dtype)) / safe
    ratio = ((mass + alpha * p_theta) / safe).clamp(min=MIN_RATIO)  # 1 + d, without its cancellation
    log = torch.where(ratio < 0.5, ratio.log(), torch.log1p(d.clamp(min=-0.5)))
    spread = torch.where(has_mass, r * (d - log), alpha * p_theta)  # without mass r (d - log(1 + d)) -> q
    jump = torch.where(is_read & can_be_noise & has_mass, log - d / ratio, 0.0)
    return (spread + jump).sum(dim=1)
