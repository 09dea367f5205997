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
            for name, shape, kind in _layer(spec)
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


def _layer(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...], TensorKind]]:
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
    yield "mlp.gate_proj.weight", (spec.ffn_hidden_size, hidden), TensorKind.MATRIX
    yield "mlp.up_proj.weight", (spec.ffn_hidden_size, hidden), TensorKind.MATRIX
    yield "mlp.down_proj.weight", (hidden, spec.ffn_hidden_size), TensorKind.RESIDUAL_MATRIX
