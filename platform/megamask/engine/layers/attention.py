"""Attention with rotary positions as a megatron-core module, and the context that travels to it.

Shapes: s sequence, b rows, h query heads, g key and value heads, d channels of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megamask.engine.layers.operators import rotary_angles, rotate
from megamask.engine.sequence import SequencePart
from megamask.models.context import AttentionPattern, Causal, Context, first_tokens, visible_mask


class RowContext(PackedSeqParams):  # type: ignore[misc]
    """Positions and attention pattern of one micro-batch's rows, on their way to the attention of every layer.

    megatron-core hands the object that it calls packed_seq_params from a stage's forward pass to each attention module,
    through recomputation too; it reads nothing from it as long as its qkv_format is not "thd". Angles and mask are made
    by the first layer that asks and kept for the others.

    Args:
        context: of the complete rows.
        part: this rank's positions of them; None for all.
    """

    def __init__(self, context: Context, part: SequencePart | None = None) -> None:
        super().__init__(qkv_format="sbhd")
        self._context = context
        self.part = part
        self._angles: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]] = {}
        self._mask: torch.Tensor | None = None
        self._bounds: torch.Tensor | None = None

    @property
    def is_causal(self) -> bool:
        """True if a kernel's own causal mask implements the pattern: it takes complete rows."""
        return isinstance(self._context.pattern, Causal) and self._context.documents is None and self.part is None

    @property
    def pattern(self) -> AttentionPattern:
        """Return which position sees which, inside a document."""
        return self._context.pattern

    def bounds(self, device: torch.device) -> torch.Tensor | None:
        """Return where documents begin in the rows laid end to end, and the end of the last row: int32 [n].

        None where rows are not divided. The end is repeated until n - 1 is a power of two, so that kernels see few
        different numbers of documents.
        """
        documents = self._context.documents
        if documents is None:
            return None
        if self._bounds is None:
            starts = first_tokens(documents).flatten().nonzero().flatten()
            count = 1 << (len(starts) - 1).bit_length()
            bounds = torch.full((count + 1,), documents.numel(), dtype=torch.int32, device=device)
            bounds[: len(starts)] = starts
            self._bounds = bounds
        return self._bounds

    def angles(
        self, x: torch.Tensor, theta: float, channels: int, *, is_compiled: bool = False, length: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine for the first channels of keys x [s, b, h, d], as `rotary_angles` returns them.

        Args:
            is_compiled: for the kernel of compiled.py.
            length: of complete rows; None where x has all of them.
        """
        dtype, length = torch.float32 if is_compiled else x.dtype, x.size(0) if length is None else length
        if dtype not in self._angles:
            self._angles[dtype] = rotary_angles(
                self._context.positions, length, channels=channels, theta=theta, device=x.device, dtype=dtype
            )
        return self._angles[dtype]

    def own_angles(
        self, x: torch.Tensor, theta: float, channels: int, *, is_compiled: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `angles`, for the positions of this rank alone, which x has."""
        length = x.size(0) if self.part is None else len(self.part.order)
        return self.own(self.angles(x, theta, channels, is_compiled=is_compiled, length=length))

    def own(self, angles: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The angles of this rank's positions, from those of complete rows."""
        if self.part is None:
            return angles
        cosine, sine = (tensor.index_select(-2, self.part.places) for tensor in angles)
        return cosine, sine

    def mask(self, num_positions: int, device: torch.device) -> torch.Tensor | None:
        """Visibility of each of num_positions keys from each query of this rank, bool [b or 1, 1, q, s].

        None where a kernel needs no mask.
        """
        if self.is_causal or self._context.is_dense:
            return None
        if self._mask is None:
            mask = visible_mask(self._context, num_positions, device)
            if mask is not None and self.part is not None:
                mask = mask.index_select(1, self.part.places)
            self._mask = None if mask is None else mask.unsqueeze(1)
        return self._mask


class RotaryAttention(MegatronModule):  # type: ignore[misc]
    """Attention with rotary positions; positions and pattern come with the rows, grouped queries share keys and values.

    Implements megatron-core's core_attention.

    Args:
        rope_theta: base of the rotary positions.
        rotary_channels: the first channels of a head, which they turn.

    Attributes:
        is_compiled: turn by one kernel (engine/kernels.py).
        shares_keys: queries of a group read one copy of its keys and values (engine/kernels.py).
    """

    is_compiled = False
    shares_keys = False

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        *,
        rope_theta: float,
        rotary_channels: int,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.rope_theta = rope_theta
        self.rotary_channels = rotary_channels
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: RowContext | None = None,
        **unused: Any,
    ) -> torch.Tensor:
        """Attend by the pattern of the rows' context; under context parallelism to the keys of all its ranks.

        Shapes: query [s, b, h, d]; key and value [s, b, g, d]; returns [s, b, h*d].

        Args:
            packed_seq_params: the rows' context, under megatron-core's name for the argument.
        """
        if attention_mask is not None or attention_bias is not None or not isinstance(packed_seq_params, RowContext):
            raise ValueError("attention takes a RowContext and neither a mask nor a bias beside it")
        if packed_seq_params.part is not None:  # keys and values travel together, before the keys are turned
            key, value = packed_seq_params.part.gather(torch.cat((key, value), dim=-1)).chunk(2, dim=-1)
        angles = packed_seq_params.angles(key, self.rope_theta, self.rotary_channels, is_compiled=self.is_compiled)
        q = rotate(query, packed_seq_params.own(angles), is_compiled=self.is_compiled)
        k = rotate(key, angles, is_compiled=self.is_compiled)
        attended = attend(
            q,
            k,
            value.permute(1, 2, 0, 3),
            mask=packed_seq_params.mask(k.size(2), q.device),
            is_causal=packed_seq_params.is_causal,
            scale=self.scale,
            shares_keys=self.shares_keys,
        )
        return attended.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    shares_keys: bool,
) -> torch.Tensor:
    """Attention of query heads in groups: head i of h reads key and value head i div (h/g).

    Shapes: q [b, h, n, d]; k and v [b, g, s, d]; mask [b or 1, 1, n, s]; returns [b, h, n, d].

    Args:
        shares_keys: where every query sees every key, the queries of a group follow one another, as if they were
            more positions of one head; no copy of keys and values is made. Under a mask or causal attention that would
            copy the mask, and keys and values are repeated in any case.
    """
    num_repeats = q.size(1) // k.size(1)
    if num_repeats > 1 and shares_keys and mask is None and not is_causal:
        together = q.reshape(q.size(0), k.size(1), -1, q.size(-1))  # a view: [b, g, h/g * n, d]
        return F.scaled_dot_product_attention(together, k, v, scale=scale).reshape(q.shape)
    if num_repeats > 1:
        # Written out: with enable_gqa torch may take the kernel that stores all n * s scores on CUDA; in float32 no
        # other one knows grouped queries.
        k, v = (tensor.repeat_interleave(num_repeats, dim=1) for tensor in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale)
