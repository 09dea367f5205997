"""The cost of interpolating noise over a vocabulary that is sharded over the tensor-parallel ranks.

`objectives/divergence.py` defines it in plain torch. Shapes: m scored positions, v columns of this rank's shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megamask.objectives.divergence import MIN_RATIO, Noised


@dataclass(frozen=True, kw_only=True)
class Shard:
    """This rank's columns.

    Args:
        first_id: id of column 0.
        is_excluded: bool [v], columns outside the softmax. can_be_noise: bool [v], ids that noise may write.
        group: the tensor-parallel ranks.
    """

    first_id: int
    is_excluded: torch.Tensor
    can_be_noise: torch.Tensor
    group: dist.ProcessGroup


class ShardedDivergence:
    """Costs of interpolating noise, kept for one backward pass; like `ShardedSoftmax`, whose place it takes.

    With g = d cost / d p_theta, d cost / d logit = p_theta * (g - sum of p_theta * g over all columns). All ranks of
    the group construct it together, each with its own columns. Everything is computed in float32.

    Args:
        logits: [m, v]. targets: int64 [m], the true ids. read: int64 [m], what the network read there.
        noised: of the positions, each [m].

    Attributes:
        cross_entropy: float32 [m], the cost in nats, alike on every rank.
        log_normalizer: float32 [m], log Z in nats, alike on every rank.
    """

    def __init__(
        self, logits: torch.Tensor, targets: torch.Tensor, read: torch.Tensor, noised: Noised, shard: Shard
    ) -> None:
        self._format = logits.dtype
        values = logits.float().masked_fill(shard.is_excluded, float("-inf"))
        largest = values.amax(dim=1)
        _all_reduce(largest, shard, dist.ReduceOp.MAX)
        p_theta = (values - largest[:, None]).exp_()
        total = p_theta.sum(dim=1)
        _all_reduce(total, shard, dist.ReduceOp.SUM)
        p_theta /= total[:, None]
        column = shard.first_id + torch.arange(values.size(1), device=values.device)
        is_target = column == targets[:, None]
        alpha = noised.alpha[:, None]
        mass = noised.token_mass[:, None] * shard.can_be_noise
        r = mass + alpha * is_target
        has_mass = r > 0
        safe = torch.where(has_mass, r, 1.0)
        d = alpha * (p_theta - is_target.to(p_theta.dtype)) / safe
        ratio = ((mass + alpha * p_theta) / safe).clamp_(min=MIN_RATIO)
        log = torch.where(ratio < 0.5, ratio.log(), torch.log1p(d.clamp(min=-0.5)))
        is_jump = (column == read[:, None]) & shard.can_be_noise & has_mass
        cost = torch.where(has_mass, r * (d - log), alpha * p_theta)
        cost += torch.where(is_jump, log - d / ratio, 0.0)
        slope = torch.where(has_mass, alpha * d / ratio, alpha)
        slope += torch.where(is_jump, alpha / safe * d / ratio.square(), 0.0)
        sums = torch.stack((cost.sum(dim=1), (p_theta * slope).sum(dim=1)))
        _all_reduce(sums, shard, dist.ReduceOp.SUM)
        self._p_theta, self._slope = p_theta, slope - sums[1][:, None]
        self.cross_entropy, self.log_normalizer = sums[0], largest + total.log()

    def logit_gradient(self, of_cross_entropy: torch.Tensor, of_log_normalizer: torch.Tensor) -> torch.Tensor:
        """Return the gradient [m, v] of this rank's logits, in their format.

        Shapes: both arguments float32 [m], the gradients of the two attributes.
        """
        gradient = self._p_theta * (self._slope * of_cross_entropy[:, None] + of_log_normalizer[:, None])
        return gradient.to(self._format)


def _all_reduce(values: torch.Tensor, shard: Shard, how: Any) -> None:
    if dist.get_world_size(shard.group) > 1:
        dist.all_reduce(values, op=how, group=shard.group)
