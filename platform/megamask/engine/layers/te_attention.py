"""Transformer Engine's attention as a core attention of the engine. Imported only where the library's layers run.

Shapes: s sequence, b rows, h query heads, g key and value heads, d channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from megamask.engine.layers.attention import RowContext
from megamask.engine.layers.operators import rotate


class RotaryTEAttention(TEDotProductAttention):  # type: ignore[misc]
    """Rotary positions, then the library's kernels; rows see one another completely or causally.

    Args:
        rope_theta: base of the rotary positions.
        rotary_channels: the first channels of a head, which they turn.

    Attributes:
        is_compiled: turn by one kernel (engine/kernels.py).
    """

    is_compiled = False

    def __init__(self, *arguments: Any, rope_theta: float, rotary_channels: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.rope_theta = rope_theta
        self.rotary_channels = rotary_channels

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: RowContext,
        **unused: Any,
    ) -> torch.Tensor:
        """Attend. Shapes: query [s, b, h, d]; key and value [s, b, g, d]; returns [s, b, h*d].

        Args:
            packed_seq_params: the rows' context, under megatron-core's name for the argument.

        Raises:
            ValueError: the context needs a mask, which these kernels do not take.
        """
        if packed_seq_params.part is not None:
            raise ValueError("device.attention=te has no context parallelism; set device.attention=sdpa")
        if attention_mask is not None or packed_seq_params.mask(query.size(0), query.device) is not None:
            raise ValueError("device.attention=te takes no mask; set device.attention=sdpa for this objective")
        angles = packed_seq_params.angles(key, self.rope_theta, self.rotary_channels, is_compiled=self.is_compiled)
        turned = (rotate(tensor, angles, is_compiled=self.is_compiled) for tensor in (query, key))
        q, k = (tensor.permute(2, 0, 1, 3).contiguous() for tensor in turned)
        pattern = AttnMaskType.causal if packed_seq_params.is_causal else AttnMaskType.no_mask
        attended: torch.Tensor = super().forward(q, k, value.contiguous(), None, pattern)
        return attended
