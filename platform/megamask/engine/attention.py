"""Bidirectional attention, RMSNorm and the feed-forward part as megatron-core modules.

Shapes: s sequence, b rows, h query heads, g key and value heads, d channels of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megamask.engine.operators import rms_norm, rotate, swiglu


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm that sequence parallelism accepts.

    megatron-core sums the gradients of parameters marked `sequence_parallel` over the tensor-parallel ranks; its own
    wrapper of torch's norms refuses sequence parallelism only because that mark is missing.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, device=torch.cuda.current_device(), dtype=config.params_dtype)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 - no attribute torch knows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape and format as x, [..., hidden_size]."""
        return rms_norm(x, self.weight, self.eps or 0.0)


class FeedForward(MLP):  # type: ignore[misc]
    """megatron-core's two matrices, whose first holds gate and up side by side, with SwiGLU between them."""

    def __init__(self, config: TransformerConfig, **unused: Any) -> None:
        super().__init__(
            config,
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            tp_group=parallel_state.get_tensor_model_parallel_group(),
        )

    def forward(self, hidden_states: torch.Tensor, **unused: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Shapes: [s, b, hidden] -> [s, b, hidden], and no bias."""
        both, _ = self.linear_fc1(hidden_states)
        output: tuple[torch.Tensor, torch.Tensor | None] = self.linear_fc2(swiglu(both))
        return output


class BidirectionalAttention(MegatronModule):  # type: ignore[misc]
    """Every position attends to every position of its row; grouped queries share keys and values.

    Implements megatron-core's core_attention, rotary positions included; it takes no mask, because masked diffusion
    needs none.

    Args:
        rope_theta: base of the rotary positions.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        *,
        rope_theta: float,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.rope_theta = rope_theta
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
        **unused: Any,
    ) -> torch.Tensor:
        """Attends without a mask.

        Shapes: query [s, b, h, d]; key and value [s, b, g, d]; returns [s, b, h*d].
        """
        if attention_mask is not None or attention_bias is not None or packed_seq_params is not None:
            raise ValueError("this attention sees every position: it takes no mask, bias or packed sequences")
        q, k = (rotate(tensor, self.rope_theta) for tensor in (query, key))
        v = value.permute(1, 2, 0, 3)
        if q.size(1) != k.size(1):
            # Written out: with enable_gqa torch may take the kernel that stores all s * s scores on CUDA; in float32 no
            # other one knows grouped queries.
            k, v = (tensor.repeat_interleave(q.size(1) // k.size(1), dim=1) for tensor in (k, v))
        attended = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return attended.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)
