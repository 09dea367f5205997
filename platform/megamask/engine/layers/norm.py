"""RMSNorm as a megatron-core module."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megamask.engine.layers.operators import rms_norm


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
