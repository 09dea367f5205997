"""The feed-forward part with Transformer Engine's linear modules. Imported only where the library's layers run."""

from __future__ import annotations

from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear, TERowParallelLinear

from megamask.engine.layers.feed_forward import FeedForward


class TEFeedForward(FeedForward):
    """The norm in front of it is a part of the first matrix's module."""

    column = TELayerNormColumnParallelLinear
    row = TERowParallelLinear
