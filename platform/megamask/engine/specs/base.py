"""Interface of a layer family for the engine.

A family is one module beside this one with two functions:

    block_spec(config, num_layers, rope_theta=, rotary_channels=, attention=) -> megatron-core's specification of a
        stage's layers
    layer_parameters(spec) -> the part that each local parameter of such a layer plays, by its name in the layer

The second describes what the first builds: the engine's parameter table (parameters.py) is made from it and refuses a
network whose parameters it does not describe.
"""

from __future__ import annotations

from enum import Enum, auto

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"


class Part(Enum):
    """The part of a layer that a local parameter holds."""

    INPUT_NORM = auto()
    QUERY_KEY_VALUE = auto()
    """Weights of the three projections, stacked by query group: its queries, its key, its value."""
    QUERY_KEY_VALUE_BIAS = auto()
    QUERY_NORM = auto()
    KEY_NORM = auto()
    ATTENTION_OUTPUT = auto()
    POST_ATTENTION_NORM = auto()
    GATE_AND_UP = auto()
    """Both matrices of SwiGLU's first half: this rank's gate rows, then its up rows."""
    DOWN = auto()
    ROUTER = auto()
    EXPERT_BIAS = auto()
    """The router's bias: a buffer, not a parameter."""
    EXPERT_GATE_AND_UP = auto()
    EXPERT_DOWN = auto()
    SHARED_GATE_AND_UP = auto()
    SHARED_DOWN = auto()


LayerPart = Part | tuple[Part, int]
"""A part of a layer; with its global number for an expert's."""


def expert_parameters(local: int, *, are_grouped: bool) -> tuple[str, str]:
    """Names in a layer of both matrices of a rank's expert; what the state on disk calls them does not depend on it."""
    if are_grouped:
        return f"mlp.experts.linear_fc1.weight{local}", f"mlp.experts.linear_fc2.weight{local}"
    prefix = f"mlp.experts.local_experts.{local}."
    return f"{prefix}linear_fc1.weight", f"{prefix}linear_fc2.weight"
