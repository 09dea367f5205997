"""Transformer Engine's attention as a core attention of the engine. Imported only where the library's layers run.

Shapes: s sequence, b rows, h query heads, g key and value heads, d channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType

from megamask.engine.layers.attention import RowContext
from megamask.engine.layers.operators import rotate
from megamask.models.context import Bidirectional, Causal

_MASKS = {Bidirectional: AttnMaskType.no_mask, Causal: AttnMaskType.causal}


class RotaryTEAttention(TEDotProductAttention):  # type: ignore[misc]
    """Rotary positions, then the library's kernels; positions of a document see one another completely or causally.

    The kernels get documents by their bounds. Under context parallelism keys and values go round the ranks in a
    ring: a rank's part of each row is the one that the library expects (engine/sequence.py), and no rank gathers rows.

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
            ValueError: the context needs a mask, or documents in a ring, which these kernels do not take.
        """
        mask = _MASKS.get(type(packed_seq_params.pattern))
        if attention_mask is not None or mask is None:
            raise ValueError("device.attention=te takes no mask; set device.attention=sdpa for this objective")
        angles = packed_seq_params.own_angles(key, self.rope_theta, self.rotary_channels, is_compiled=self.is_compiled)
        q, k = (rotate(tensor, angles, is_compiled=self.is_compiled) for tensor in (query, key))
        bounds = packed_seq_params.bounds(query.device)
        if bounds is None:
            q, k = (tensor.permute(2, 0, 1, 3).contiguous() for tensor in (q, k))
            attended: torch.Tensor = super().forward(q, k, value.contiguous(), None, mask)
            return attended
        if packed_seq_params.part is not None:
            raise ValueError("device.attention=te takes no documents under context parallelism; set it to sdpa")
        length, rows = query.shape[:2]
        q, k = (tensor.transpose(1, 2).flatten(0, 1).contiguous() for tensor in (q, k))
        v = value.transpose(0, 1).flatten(0, 1).contiguous()
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=length,
            max_seqlen_kv=length,
        )
        attended = super().forward(q, k, v, None, mask, packed_seq_params=packed)
        return attended.view(rows, length, -1).transpose(0, 1).contiguous()
