"""Cross entropy over a vocabulary that is sharded over the tensor-parallel ranks, and the softmax's normaliser.

Shapes: m scored positions, v columns of this rank's shard of the padded vocabulary.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


class ShardedSoftmax:
    """Softmax of each position over the columns of all ranks of a group, kept for one backward pass.

    log Z = max + log(sum exp(x - max)); d log Z / d x = softmax, d CE / d x = softmax - one-hot. All ranks of the group
    construct it together, each with its own columns. Everything is computed in float32;
    float32 logits are used up: their memory holds the exponentials afterwards.

    Args:
        logits: [m, v], this rank's columns; without a gradient of its own.
        targets: int64 [m], ids in the full vocabulary, the same on every rank; none may be an excluded one.
        is_excluded: bool [v], columns that never enter the softmax.
        first_id: vocabulary id of column 0.
        group: the tensor-parallel ranks.

    Attributes:
        cross_entropy: float32 [m], nats, alike on every rank.
        log_normalizer: float32 [m], log Z in nats, alike on every rank.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        is_excluded: torch.Tensor,
        first_id: int,
        group: dist.ProcessGroup,
    ) -> None:
        self._format = logits.dtype
        is_sharded = dist.get_world_size(group) > 1
        self._exponentials = logits.float().masked_fill_(is_excluded, float("-inf"))
        self._is_mine = (targets >= first_id) & (targets < first_id + logits.size(1))
        self._column = torch.where(self._is_mine, targets - first_id, 0)
        target_logit = self._exponentials.gather(1, self._column[:, None]).squeeze(1)
        largest = self._exponentials.amax(dim=1)
        if is_sharded:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        self._exponentials.sub_(largest[:, None]).exp_()
        sums = torch.stack((self._exponentials.sum(dim=1), torch.where(self._is_mine, target_logit, 0.0)))
        if is_sharded:
            dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=group)
        self._normalizer = sums[0]
        self.log_normalizer = largest + sums[0].log()
        self.cross_entropy = self.log_normalizer - sums[1]

    def logit_gradient(self, of_cross_entropy: torch.Tensor, of_log_normalizer: torch.Tensor) -> torch.Tensor:
        """Return the gradient [m, v] of this rank's logits, in their format; the softmax is used up.

        Shapes: both arguments float32 [m], the gradients of the two attributes.
        """
        gradient = self._exponentials.mul_(((of_cross_entropy + of_log_normalizer) / self._normalizer)[:, None])
        rows = torch.arange(len(self._column), device=gradient.device)  # one column a row: the order of sums is fixed
        gradient[rows, self._column] -= torch.where(self._is_mine, of_cross_entropy, 0.0)
        return gradient.to(self._format)
