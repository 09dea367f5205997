"""Layers of Transformer Engine: its linear modules, with the norms in front of them fused into them.

SwiGLU is megamask's; attention is megamask's or the library's, by device.attention. Imported only where the library is
installed.
"""

from __future__ import annotations

from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megamask.engine.layers.attention import RotaryAttention
from megamask.engine.layers.te_attention import RotaryTEAttention
from megamask.engine.layers.te_feed_forward import TEFeedForward
from megamask.engine.specs.base import Part
from megamask.engine.specs.shared import block_of, parts_of
from megamask.models.spec import ModelSpec


def block_spec(
    config: TransformerConfig,
    num_layers: int,
    *,
    rope_theta: float,
    rotary_channels: int,
    attention: str = "sdpa",
) -> TransformerBlockSubmodules:
    """Specify a stage of num_layers layers and the final norm; attention is "sdpa" or "te"."""
    layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    return block_of(
        layer,
        num_layers,
        attention=RotaryTEAttention if attention == "te" else RotaryAttention,
        feed_forward=TEFeedForward,
        final_norm=TENorm,
        rope_theta=rope_theta,
        rotary_channels=rotary_channels,
    )


def layer_parameters(spec: ModelSpec) -> dict[str, Part]:
    """Parts of a layer's parameters, by their names in the layer."""
    return parts_of(
        spec,
        input_norm="self_attention.linear_qkv.layer_norm_weight",
        post_attention_norm="mlp.linear_fc1.layer_norm_weight",
    )
