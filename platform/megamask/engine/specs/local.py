"""Layers of megatron-core's own linear modules with megamask's norms, attention and SwiGLU; they run on any device."""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megamask.engine.layers.attention import RotaryAttention
from megamask.engine.layers.feed_forward import FeedForward
from megamask.engine.layers.norm import RMSNorm
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
    """Specify a stage of num_layers layers and the final norm; attention is "sdpa"."""
    if attention != "sdpa":
        raise ValueError(f"these layers have no attention {attention!r}")
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    if config.qk_layernorm:
        layer.submodules.self_attention.submodules.q_layernorm = RMSNorm
        layer.submodules.self_attention.submodules.k_layernorm = RMSNorm
    return block_of(
        layer,
        num_layers,
        attention=RotaryAttention,
        feed_forward=FeedForward,
        final_norm=RMSNorm,
        rope_theta=rope_theta,
        rotary_channels=rotary_channels,
    )


def layer_parameters(spec: ModelSpec) -> dict[str, Part]:
    """Parts of a layer's parameters, by their names in the layer."""
    return parts_of(spec, input_norm="input_layernorm.weight", post_attention_norm="pre_mlp_layernorm.weight")
