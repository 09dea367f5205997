"""Vocabulary lookup whose gradient is summed in float32 (used where the network computes in another format).

About half of the input ids of masked diffusion are the mask token. torch adds the copies of a row one after another in
the table's own format: in bf16 the sum of thousands of copies stops growing once it is 256 times as large as an addend,
and the gradient of the mask token's row came out a third too short. Here every sum is float32 and goes straight into
the float32 gradient buffer.

Shapes: b rows, s sequence, n = b*s positions, v rows of this rank's shard of the table, h hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from megamask.engine.gradients import taken


class WideSumEmbedding(torch.nn.Module):
    """Lookup in megatron-core's vocabulary-parallel table, with the table's weight and layout kept.

    Args:
        table: the module to replace; its parameter is used, not copied.
        frequent_id: id whose copies are summed by one reduction instead of one after another: the mask token.
    """

    def __init__(self, table: VocabParallelEmbedding, frequent_id: int) -> None:
        super().__init__()
        self.weight = table.weight
        self._first_id: int = table.vocab_start_index
        self._frequent_id = frequent_id
        self._group = table.tp_group
        self._is_scattered: bool = table.reduce_scatter_embeddings

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Shapes: ids int64 [b, s] -> [b, s, h], or [s/tp, b, h] under sequence parallelism."""
        embedded: torch.Tensor = _Lookup.apply(  # type: ignore[no-untyped-call]
            self.weight, ids - self._first_id, self._frequent_id - self._first_id
        )
        if self._is_scattered:
            embedded = reduce_scatter_to_sequence_parallel_region(
                embedded.transpose(0, 1).contiguous(), group=self._group
            )
        else:
            embedded = reduce_from_tensor_model_parallel_region(embedded, group=self._group)
        return embedded


class _Lookup(torch.autograd.Function):
    """Rows of the table; zeros for ids of other ranks' shards.

    The gradient of the table does not travel through autograd: it is added to `weight.main_grad`, which the hook of
    megatron-core's buffers leaves alone when no other gradient arrives. A tied output layer's gradient does arrive
    there, and both add up. A table without a gradient buffer gets the float32 sum, rounded once.
    """

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, rows: torch.Tensor, frequent_row: int) -> torch.Tensor:
        is_mine = (rows >= 0) & (rows < weight.size(0))
        ctx.weight, ctx.frequent_row = weight, frequent_row
        ctx.save_for_backward(rows, is_mine)
        return weight[torch.where(is_mine, rows, 0)].masked_fill_(~is_mine.unsqueeze(-1), 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        rows, is_mine = (tensor.reshape(-1) for tensor in ctx.saved_tensors)
        weight = ctx.weight
        has_buffer = hasattr(weight, "main_grad")
        total = weight.main_grad if has_buffer else torch.zeros_like(weight, dtype=torch.float32)
        add_rows(total, rows, is_mine, gradient.reshape(-1, gradient.size(-1)), frequent_row=ctx.frequent_row)
        return (taken(weight) if has_buffer else total.to(weight.dtype)), None, None


def add_rows(
    total: torch.Tensor, rows: torch.Tensor, is_mine: torch.Tensor, gradient: torch.Tensor, *, frequent_row: int
) -> None:
    """Add each position's gradient to its row of a float32 table, in an order that only the shapes determine.

    Shapes: total float32 [v, h], changed in place; rows int64 [n]; is_mine bool [n], the others are left out;
    gradient [n, h] in any format.

    Args:
        frequent_row: row of `total` to sum by one reduction; a value outside [0, v) for none.
    """
    is_frequent = rows == frequent_row
    is_other = is_mine & ~is_frequent
    if 0 <= frequent_row < total.size(0):
        total[frequent_row] += gradient.masked_fill(~is_frequent.unsqueeze(-1), 0.0).sum(dim=0, dtype=torch.float32)
    # Positions that are left out add zeros, each to another row: shapes stay fixed, so that no device waits for the
    # host, and no row collects thousands of addends, which a device adds one after another.
    spread = torch.arange(rows.size(0), device=rows.device) % total.size(0)
    addends = gradient.float().masked_fill_(~is_other.unsqueeze(-1), 0.0)
    total.index_add_(0, torch.where(is_other, rows, spread), addends)
