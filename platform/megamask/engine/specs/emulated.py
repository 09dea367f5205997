"""The local layers with linear modules whose FP8 products are emulated; parameters and names are the local ones.

Which recipe a layer's products use is set after the network is built (engine/fp8.py); before, they are the usual ones.
"""

from __future__ import annotations

from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megamask.engine.layers.fp8_linear import (
    EmulatedColumnParallelLinear,
    EmulatedFeedForward,
    EmulatedRowParallelLinear,
)
from megamask.engine.specs import local
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
    """Specify a stage of num_layers layers and the final norm; attention is "sdpa"."""
    block = local.block_spec(
        config, num_layers, rope_theta=rope_theta, rotary_channels=rotary_channels, attention=attention
    )
    for layer in block.layer_specs[:1]:  # one object, listed once for each layer
        self_attention = layer.submodules.self_attention.submodules
        self_attention.linear_qkv = EmulatedColumnParallelLinear
        self_attention.linear_proj = EmulatedRowParallelLinear
        layer.submodules.mlp = EmulatedFeedForward
    return block


def layer_parameters(spec: ModelSpec) -> dict[str, Part]:
    """Parts of a layer's parameters, by their names in the layer."""
    return local.layer_parameters(spec)
