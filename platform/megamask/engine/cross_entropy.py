"""Cross entropy over a vocabulary that is sharded over the tensor-parallel ranks, and the softmax's normaliser.

Shapes: m scored positions, v columns of this rank's shard of the padded vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def sharded_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, is_excluded: torch.Tensor, first_id: int, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of the targets and log Z, the logarithm of the softmax's normaliser, at each position.

    All ranks of the group call this together, each with its own columns. Everything is computed in float32, whatever
    the logits' format; float32 logits are used up: their memory holds the softmax afterwards.

    Args:
        logits: [m, v], this rank's columns.
        targets: int64 [m], ids in the whole vocabulary, alike on every rank; none may be an excluded one.
        is_excluded: bool [v], columns that never enter the softmax.
        first_id: vocabulary id of column 0.
        group: the tensor-parallel ranks.

    Returns:
        (cross entropy float32 [m], log Z float32 [m]), in nats, alike on every rank; both have gradients.
    """
    pair: tuple[torch.Tensor, torch.Tensor] = _ShardedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits, targets, is_excluded, first_id, group
    )
    return pair


class _ShardedCrossEntropy(torch.autograd.Function):
    """log Z = max + log(sum exp(x - max)); d log Z / d x = softmax, d CE / d x = softmax - one-hot."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        is_excluded: torch.Tensor,
        first_id: int,
        group: dist.ProcessGroup,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.format = logits.dtype
        is_sharded = dist.get_world_size(group) > 1
        exponentials = logits.float().masked_fill_(is_excluded, float("-inf"))
        is_mine = (targets >= first_id) & (targets < first_id + logits.size(1))
        column = torch.where(is_mine, targets - first_id, 0)
        target_logit = torch.where(is_mine, exponentials.gather(1, column[:, None]).squeeze(1), 0.0)
        largest = exponentials.amax(dim=1)
        if is_sharded:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        exponentials.sub_(largest[:, None]).exp_()
        sums = torch.stack((exponentials.sum(dim=1), target_logit))
        if is_sharded:
            dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=group)
        log_normalizer = largest + sums[0].log()
        ctx.save_for_backward(exponentials, sums[0], column, is_mine)
        return log_normalizer - sums[1], log_normalizer

    @staticmethod
    def backward(
        ctx: Any, grad_cross_entropy: torch.Tensor, grad_log_normalizer: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None, None]:
        exponentials, normalizer, column, is_mine = ctx.saved_tensors
        gradient = exponentials.mul_(((grad_cross_entropy + grad_log_normalizer) / normalizer)[:, None])
        rows = torch.arange(column.size(0), device=column.device)  # one column a row: the order of sums is fixed
        gradient[rows, column] -= torch.where(is_mine, grad_cross_entropy, 0.0)
        return gradient.to(ctx.format), None, None, None, None
