"""Names, shapes and kinds of a network's canonical tensors; integers only.

Canonical tensors are the unfused, Hugging-Face-style ones, with global layer numbers and the unpadded vocabulary.
Initial weights, the checkpoint, counts, conversion and the engine's parameter table read them here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache
from types import MappingProxyType

from megamask.models.spec import ModelSpec

EMBEDDING_NAME = "model.embed_tokens.weight"
FINAL_NORM_NAME = "model.norm.weight"
HEAD_NAME = "lm_head.weight"


class TensorKind(Enum):
    """The purpose of a tensor: initial values, weight decay and number formats depend on it, never on its name."""

    EMBEDDING = auto()
    HEAD = auto()
    MATRIX = auto()
    RESIDUAL_MATRIX = auto()
    """A projection that writes to the residual stream."""
    NORM = auto()
    BIAS = auto()
    EXPERT_BIAS = auto()
    """A router's bias for the choice of experts: no gradient, no moments, 0 at first (models/routing.py)."""


@dataclass(frozen=True, kw_only=True)
class CanonicalTensor:
    """One tensor of a network.

    Args:
        shape: as stored.
        layer: global number of its layer; None outside the layers.
    """

    name: str
    shape: tuple[int, ...]
    kind: TensorKind
    layer: int | None = None


@lru_cache(maxsize=8)
def canonical_tensors(spec: ModelSpec) -> Mapping[str, CanonicalTensor]:
    """Every canonical tensor by name, in the network's order; the head is absent where it is tied."""
    hidden = spec.hidden_size
    tensors = [CanonicalTensor(name=EMBEDDING_NAME, shape=(spec.vocab_size, hidden), kind=TensorKind.EMBEDDING)]
    for layer in range(spec.num_layers):
        tensors += [
            CanonicalTensor(name=f"{layer_prefix(layer)}{name}", shape=shape, kind=kind, layer=layer)
            for name, shape, kind in _layer(spec, layer)
        ]
    tensors.append(CanonicalTensor(name=FINAL_NORM_NAME, shape=(hidden,), kind=TensorKind.NORM))
    if not spec.tie_embeddings:
        tensors.append(CanonicalTensor(name=HEAD_NAME, shape=(spec.vocab_size, hidden), kind=TensorKind.HEAD))
    return MappingProxyType({tensor.name: tensor for tensor in tensors})


@lru_cache(maxsize=8)
def canonical_shapes(spec: ModelSpec) -> Mapping[str, tuple[int, ...]]:
    """Name and shape of every canonical tensor, in the network's order."""
    return MappingProxyType({name: tensor.shape for name, tensor in canonical_tensors(spec).items()})


def layer_prefix(layer: int) -> str:
    """Begin of the names of a layer's tensors."""
    return f"model.layers.{layer}."


def expert_prefix(expert: int) -> str:
    """Begin of the names of an expert's tensors, inside a layer."""
    return f"mlp.experts.{expert}."


SHARED_PREFIX = "mlp.shared_experts."
ROUTER_NAME = "mlp.gate.weight"
EXPERT_BIAS_NAME = "mlp.gate.expert_bias"


def _layer(spec: ModelSpec, layer: int) -> Iterator[tuple[str, tuple[int, ...], TensorKind]]:
    """Name inside the layer, shape and kind."""
    hidden = spec.hidden_size
    queries, keys = spec.num_attention_heads * spec.head_dim, spec.num_query_groups * spec.head_dim
    yield "input_layernorm.weight", (hidden,), TensorKind.NORM
    for letter, rows in (("q", queries), ("k", keys), ("v", keys)):
        yield f"self_attn.{letter}_proj.weight", (rows, hidden), TensorKind.MATRIX
        if spec.qkv_bias:
            yield f"self_attn.{letter}_proj.bias", (rows,), TensorKind.BIAS
    if spec.qk_norm:
        yield "self_attn.q_norm.weight", (spec.head_dim,), TensorKind.NORM
        yield "self_attn.k_norm.weight", (spec.head_dim,), TensorKind.NORM
    yield "self_attn.o_proj.weight", (hidden, queries), TensorKind.RESIDUAL_MATRIX
    yield "post_attention_layernorm.weight", (hidden,), TensorKind.NORM
    experts = spec.experts
    if experts is None or not spec.has_experts(layer):
        yield from _feed_forward("mlp.", hidden, spec.ffn_hidden_size)
        return
    yield ROUTER_NAME, (experts.num_experts, hidden), TensorKind.MATRIX
    if experts.has_bias:
        yield EXPERT_BIAS_NAME, (experts.num_experts,), TensorKind.EXPERT_BIAS
    for expert in range(experts.num_experts):
        yield from _feed_forward(expert_prefix(expert), hidden, experts.ffn_hidden_size)
    if experts.num_shared:
        yield from _feed_forward(SHARED_PREFIX, hidden, experts.shared_hidden_size)


def _feed_forward(prefix: str, hidden: int, width: int) -> Iterator[tuple[str, tuple[int, ...], TensorKind]]:
    yield f"{prefix}gate_proj.weight", (width, hidden), TensorKind.MATRIX
    yield f"{prefix}up_proj.weight", (width, hidden), TensorKind.MATRIX
    yield f"{prefix}down_proj.weight", (hidden, width), TensorKind.RESIDUAL_MATRIX
