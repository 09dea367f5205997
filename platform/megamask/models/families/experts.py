"""Mixture-of-experts families: how their published tensors are made of canonical ones.

A published tensor is one canonical tensor, or several of them one above the other (fused queries, keys and values), or
several stacked along a new first dimension (merged experts). Cutting and joining move bytes and change none. Canonical
names are Qwen3-MoE's: `mlp.gate`, `mlp.experts.E.{gate,up,down}_proj`, `mlp.shared_experts.*`, and LLaDA2's buffer
`mlp.gate.expert_bias`, which its router adds to the scores.

Sources: transformers, models/qwen3_moe; LLaDA-MoE, modeling_lladamoe.py; RND1, modeling_rnd.py; LLaDA2.0 and dFactory,
modeling_llada2_moe.py (`query_key_value` holds all queries, then all keys, then all values; dFactory merges experts).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megamask.models.families.base import TokenIds, unsupported

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Joined:
    """A published tensor.

    Args:
        name: as published.
        parts: canonical tensors, in order, with the shape of each.
        how: "same" for one part, "rows" for parts above one another, "stack" for a new first dimension.
    """

    name: str
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    how: Literal["same", "rows", "stack"] = "same"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the published tensor."""
        shapes = [shape for _, shape in self.parts]
        if self.how == "stack":
            return (len(shapes), *shapes[0])
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


@dataclass(frozen=True, kw_only=True)
class ExpertSizes:
    """Numbers of a mixture-of-experts network that its tensors depend on.

    Args:
        num_dense_layers: first layers with a plain feed-forward part of `ffn_hidden_size`.
        num_shared: experts that every token visits, kept as one of that many widths; 0 for none.
    """

    num_layers: int
    num_dense_layers: int
    hidden_size: int
    ffn_hidden_size: int
    expert_hidden_size: int
    num_experts: int
    num_shared: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class ExpertFamily:
    """One published mixture-of-experts architecture.

    Args:
        outer, inner: canonical name -> published name, outside the layers and inside one; others keep their names.
        is_fused: queries, keys and values are one tensor.
        has_expert_bias: whether a router has the buffer `expert_bias`.
        dense_layers: of a config.json: how many first layers are dense.
    """

    name: str
    architectures: tuple[str, ...]
    ids: TokenIds
    dense_layers: Callable[[Mapping[str, Any]], int]
    shared_key: str | None = None
    expert_size_key: str = "moe_intermediate_size"
    dense_size_key: str = "intermediate_size"
    outer: Mapping[str, str] = field(default_factory=dict)
    inner: Mapping[str, str] = field(default_factory=dict)
    is_fused: bool = False
    has_expert_bias: bool = False

    def sizes(self, config: Mapping[str, Any]) -> ExpertSizes:
        """The numbers of a config.json.

        Raises:
            UsageError: one is missing or impossible.
        """

        def number(key: str, default: int | None = None) -> int:
            value = config.get(key, default)
            if type(value) is not int or value < 0:
                raise unsupported(f"{key} is {value!r}" if key in config else f"{key} is missing", "a positive integer")
            return value

        heads = number("num_attention_heads")
        return ExpertSizes(
            num_layers=number("num_hidden_layers"),
            num_dense_layers=self.dense_layers(config),
            hidden_size=number("hidden_size"),
            ffn_hidden_size=number(self.dense_size_key),
            expert_hidden_size=number(self.expert_size_key),
            # newer files of the same models name it after the local experts
            num_experts=number("num_experts" if "num_experts" in config else "num_local_experts"),
            num_shared=0 if self.shared_key is None else number(self.shared_key, 0),
            num_attention_heads=heads,
            num_query_groups=number("num_key_value_heads", heads),
            head_dim=number("head_dim", number("hidden_size") // heads),
            vocab_size=number("vocab_size"),
        )

    def tensors(self, sizes: ExpertSizes, *, merged_experts: bool = False) -> list[Joined]:
        """Every published tensor, in the network's order.

        Args:
            merged_experts: a layer's experts are one tensor a projection, as transformers and dFactory train them.
        """
        hidden, vocabulary = sizes.hidden_size, sizes.vocab_size
        found = [self._one("model.embed_tokens.weight", (vocabulary, hidden))]
        for layer in range(sizes.num_layers):
            found += self._attention(layer, sizes)
            found += self._feed_forward(layer, sizes, merged_experts=merged_experts)
        return [*found, self._one("model.norm.weight", (hidden,)), self._one("lm_head.weight", (vocabulary, hidden))]

    def hub_name(self, canonical: str) -> str:
        """A canonical tensor's published name, where it is one by itself."""
        if canonical in self.outer:
            return self.outer[canonical]
        if match := _LAYER.fullmatch(canonical):
            return f"model.layers.{match[1]}.{self.inner.get(match[2], match[2])}"
        return canonical

    def _one(self, canonical: str, shape: tuple[int, ...]) -> Joined:
        return Joined(name=self.hub_name(canonical), parts=((canonical, shape),))

    def _attention(self, layer: int, sizes: ExpertSizes) -> Iterator[Joined]:
        prefix, hidden = f"model.layers.{layer}.", sizes.hidden_size
        queries, keys = sizes.num_attention_heads * sizes.head_dim, sizes.num_query_groups * sizes.head_dim
        yield self._one(f"{prefix}input_layernorm.weight", (hidden,))
        rows = tuple(
            (f"{prefix}self_attn.{letter}_proj.weight", (size, hidden))
            for letter, size in (("q", queries), ("k", keys), ("v", keys))
        )
        if self.is_fused:
            yield Joined(name=f"{prefix}attention.query_key_value.weight", parts=rows, how="rows")
        else:
            yield from (self._one(*row) for row in rows)
        for norm in ("q_norm", "k_norm"):
            yield self._one(f"{prefix}self_attn.{norm}.weight", (sizes.head_dim,))
        yield self._one(f"{prefix}self_attn.o_proj.weight", (hidden, queries))
        yield self._one(f"{prefix}post_attention_layernorm.weight", (hidden,))

    def _feed_forward(self, layer: int, sizes: ExpertSizes, *, merged_experts: bool) -> Iterator[Joined]:
        prefix = f"model.layers.{layer}.mlp."
        if layer < sizes.num_dense_layers:
            yield from self._projections(prefix, sizes.hidden_size, sizes.ffn_hidden_size)
            return
        yield self._one(f"{prefix}gate.weight", (sizes.num_experts, sizes.hidden_size))
        if self.has_expert_bias:
            yield self._one(f"{prefix}gate.expert_bias", (sizes.num_experts,))
        width = sizes.expert_hidden_size
        if merged_experts:
            for projection in _PROJECTIONS:
                shape = _projection_shape(projection, sizes.hidden_size, width)
                parts = tuple((f"{prefix}experts.{e}.{projection}.weight", shape) for e in range(sizes.num_experts))
                yield Joined(name=f"{prefix}experts.{projection}", parts=parts, how="stack")
        else:
            for expert in range(sizes.num_experts):
                yield from self._projections(f"{prefix}experts.{expert}.", sizes.hidden_size, width)
        if sizes.num_shared:
            yield from self._projections(f"{prefix}shared_experts.", sizes.hidden_size, sizes.num_shared * width)

    def _projections(self, prefix: str, hidden: int, width: int) -> Iterator[Joined]:
        for projection in _PROJECTIONS:
            yield self._one(f"{prefix}{projection}.weight", _projection_shape(projection, hidden, width))


def _projection_shape(projection: str, hidden: int, width: int) -> tuple[int, int]:
    return (hidden, width) if projection == "down_proj" else (width, hidden)


def _none_dense(config: Mapping[str, Any]) -> int:
    """Qwen's switches for dense layers in between must be at their defaults."""
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise unsupported("mlp_only_layers or decoder_sparse_step names dense layers", "experts in every layer")
    return 0


def _first_dense(config: Mapping[str, Any]) -> int:
    value = config.get("first_k_dense_replace", 0)
    if type(value) is not int or value < 0:
        raise unsupported(f"first_k_dense_replace is {value!r}", "a number of layers")
    return value


def _by_frequency(config: Mapping[str, Any]) -> int:
    """LLaDA-MoE lists a 0 or 1 for each layer; dense layers must come first."""
    listed = config.get("moe_layer_freq") or []
    if not isinstance(listed, list) or sorted(listed) != listed or not set(listed) <= {0, 1}:
        raise unsupported(f"moe_layer_freq is {listed!r}", "0 for the first dense layers, then 1")
    return listed.count(0)


QWEN3_MOE = ExpertFamily(
    name="qwen3_moe", architectures=("Qwen3MoeForCausalLM",), ids=TokenIds(), dense_layers=_none_dense
)
RND1 = ExpertFamily(
    name="rnd1",
    architectures=("RND1LM",),
    ids=TokenIds(mask=151669, eos=151645, pad=151643),
    dense_layers=_none_dense,
)
LLADA_MOE = ExpertFamily(
    name="llada_moe",
    architectures=("LLaDAMoEModelLM",),
    ids=TokenIds(mask=156895, eos=156892),
    dense_layers=_by_frequency,
    expert_size_key="expert_intermediate_size",
    dense_size_key="dense_intermediate_size",
)
LLADA2 = ExpertFamily(
    name="llada2_moe",
    architectures=("LLaDA2MoeModelLM",),
    ids=TokenIds(mask=156895, eos=156892, pad=156892),
    dense_layers=_first_dense,
    shared_key="num_shared_experts",
    outer={"model.embed_tokens.weight": "model.word_embeddings.weight"},
    inner={
        "self_attn.q_norm.weight": "attention.query_layernorm.weight",
        "self_attn.k_norm.weight": "attention.key_layernorm.weight",
        "self_attn.o_proj.weight": "attention.dense.weight",
    },
    is_fused=True,
    has_expert_bias=True,
)
EXPERT_FAMILIES: Mapping[str, ExpertFamily] = {family.name: family for family in (QWEN3_MOE, RND1, LLADA_MOE, LLADA2)}
