"""Common parts of the layer families: attention by the rows' context, megamask's SwiGLU, and the parts' names."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megamask.engine.specs.base import Part
from megamask.models.spec import ModelSpec


def block_of(
    layer: ModuleSpec, num_layers: int, *, attention: type, feed_forward: type, final_norm: Any, **rotary: Any
) -> TransformerBlockSubmodules:
    """Specify a stage of num_layers times the layer and the final norm.

    Args:
        layer: megatron-core's own specification, changed in place.
        rotary: rope_theta and rotary_channels.
    """
    self_attention = layer.submodules.self_attention
    self_attention.params["attn_mask_type"] = AttnMaskType.no_mask  # the rows' context decides
    self_attention.submodules.core_attention = ModuleSpec(module=attention, params=rotary)
    layer.submodules.mlp = feed_forward
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=final_norm)


def parts_of(spec: ModelSpec, *, input_norm: str, post_attention_norm: str) -> dict[str, Part]:
    """Parts of a layer's parameters, by their names in the layer; families differ in the names of two norms."""
    parts = {
        input_norm: Part.INPUT_NORM,
        "self_attention.linear_qkv.weight": Part.QUERY_KEY_VALUE,
        "self_attention.linear_proj.weight": Part.ATTENTION_OUTPUT,
        post_attention_norm: Part.POST_ATTENTION_NORM,
        "mlp.linear_fc1.weight": Part.GATE_AND_UP,
        "mlp.linear_fc2.weight": Part.DOWN,
    }
    if spec.qkv_bias:
        parts["self_attention.linear_qkv.bias"] = Part.QUERY_KEY_VALUE_BIAS
    if spec.qk_norm:
        parts["self_attention.q_layernorm.weight"] = Part.QUERY_NORM
        parts["self_attention.k_layernorm.weight"] = Part.KEY_NORM
    return parts
