"""The feed-forward part of a layer as a megatron-core module. Shapes: s sequence, b rows."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megamask.engine.layers.operators import swiglu


class FeedForward(MLP):  # type: ignore[misc]
    """megatron-core's two matrices, the first of which holds gate and up side by side, with SwiGLU between them.

    Attributes:
        column, row: classes of the two matrices' modules.
        is_compiled: SwiGLU by one kernel (engine/kernels.py).
    """

    is_compiled = False
    column: type[torch.nn.Module] = ColumnParallelLinear
    row: type[torch.nn.Module] = RowParallelLinear

    def __init__(self, config: TransformerConfig, **unused: Any) -> None:
        super().__init__(
            config,
            MLPSubmodules(linear_fc1=self.column, linear_fc2=self.row),
            ffn_hidden_size=config.ffn_hidden_size,
        )

    def forward(self, hidden_states: torch.Tensor, **unused: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Shapes: [s, b, hidden] -> [s, b, hidden], and no bias."""
        both, _ = self.linear_fc1(hidden_states)
        output: tuple[torch.Tensor, torch.Tensor | None] = self.linear_fc2(swiglu(both, is_compiled=self.is_compiled))
        return output
