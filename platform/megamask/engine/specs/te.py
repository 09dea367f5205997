"""Layers of Transformer Engine: its linear modules, with the norms in front of them fused into them.

Attention is megamask's own or the library's, by device.attention. Imported only where the library is installed.
"""

from __future__ import annotations

from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megamask.engine.layers.attention import RotaryAttention
from megamask.engine.layers.te_attention import RotaryTEAttention
from megamask.engine.specs.base import Part
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
    self_attention = layer.submodules.self_attention
    self_attention.params["attn_mask_type"] = AttnMaskType.no_mask  # the rows' context decides
    self_attention.submodules.core_attention = ModuleSpec(
        module=RotaryTEAttention if attention == "te" else RotaryAttention,
        params={"rope_theta": rope_theta, "rotary_channels": rotary_channels},
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=TENorm)


def layer_parameters(spec: ModelSpec) -> dict[str, Part]:
    """Parts of a layer's parameters, by their names in the layer."""
    parts = {
        "self_attention.linear_qkv.layer_norm_weight": Part.INPUT_NORM,
        "self_attention.linear_qkv.weight": Part.QUERY_KEY_VALUE,
        "self_attention.linear_proj.weight": Part.ATTENTION_OUTPUT,
        "mlp.linear_fc1.layer_norm_weight": Part.POST_ATTENTION_NORM,
        "mlp.linear_fc1.weight": Part.GATE_AND_UP,
        "mlp.linear_fc2.weight": Part.DOWN,
    }
    if spec.qkv_bias:
        parts["self_attention.linear_qkv.bias"] = Part.QUERY_KEY_VALUE_BIAS
    if spec.qk_norm:
        parts["self_attention.q_layernorm.weight"] = Part.QUERY_NORM
        parts["self_attention.k_layernorm.weight"] = Part.KEY_NORM
    return parts
