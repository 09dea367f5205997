"""Which part of which canonical tensor each local parameter holds.

Canonical names and shapes are those of the unfused, Hugging-Face-style tensors (models/initial_weights.py). A local
parameter is a stack of row blocks; each block is a rectangle of one canonical tensor. This one table serves the initial
weights, the checkpoint and the tests, so a layout that is wrong in one place is wrong in all and shows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megamask.engine.topology import Topology
from megamask.models.spec import ModelSpec

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_WHOLE = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
}


@dataclass(frozen=True, kw_only=True)
class Block:
    """Rows [first_row, first_row + sizes[0]) of a local parameter, equal to a rectangle of a canonical tensor.

    Args:
        name: the canonical tensor.
        first_row: where the block begins in the local parameter.
        offsets, sizes: the rectangle, in the canonical tensor's coordinates; it spans every local column.
    """

    name: str
    first_row: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def index(self) -> tuple[slice, ...]:
        """The rectangle as an index into the canonical tensor."""
        return tuple(slice(offset, offset + size) for offset, size in zip(self.offsets, self.sizes, strict=True))


@dataclass(frozen=True, kw_only=True)
class CanonicalMap:
    """Maps this rank's parameters, by megatron-core's names, to blocks of canonical tensors."""

    spec: ModelSpec
    topology: Topology

    def blocks(self, parameter: str) -> list[Block]:
        """The blocks of a local parameter; rows in none of them are vocabulary padding, which is always zero.

        Raises:
            KeyError: a parameter that no canonical tensor corresponds to.
        """
        if parameter == "embedding.word_embeddings.weight":
            return self._vocabulary("model.embed_tokens.weight")
        if parameter == "output_layer.weight":
            return self._vocabulary("model.embed_tokens.weight" if self.spec.tie_embeddings else "lm_head.weight")
        if parameter == "decoder.final_layernorm.weight":
            return [_whole("model.norm.weight", self.spec.hidden_size)]
        if match := _LAYER.fullmatch(parameter):
            layer = self.topology.layers(self.spec.num_layers)[int(match[1])]
            return list(self._layer(f"model.layers.{layer}.", match[2]))
        raise KeyError(f"no canonical tensor corresponds to the parameter {parameter}")

    def is_owner(self, parameter: str) -> bool:
        """Whether this rank's copy is the one that is stored: replicas and the tied output layer's copy are not."""
        if parameter == "output_layer.weight" and self.spec.tie_embeddings:
            return False
        return self.is_sharded(parameter) or self.topology.tensor_parallel_rank == 0

    @staticmethod
    def is_sharded(parameter: str) -> bool:
        """Whether the tensor-parallel ranks hold different parts of a parameter; norms they hold alike."""
        return "layernorm" not in parameter

    def _vocabulary(self, name: str) -> list[Block]:
        rows = self.spec.padded_vocab_size // self.topology.tensor_parallel_size
        first = self.topology.tensor_parallel_rank * rows
        real = min(rows, self.spec.vocab_size - first)
        if real <= 0:
            return []
        return [Block(name=name, first_row=0, offsets=(first, 0), sizes=(real, self.spec.hidden_size))]

    def _layer(self, prefix: str, parameter: str) -> Iterator[Block]:
        spec, tp, rank = self.spec, self.topology.tensor_parallel_size, self.topology.tensor_parallel_rank
        if parameter in _WHOLE:
            is_head_norm = parameter.startswith("self_attention")
            yield _whole(prefix + _WHOLE[parameter], spec.head_dim if is_head_norm else spec.hidden_size)
        elif parameter.startswith("self_attention.linear_qkv."):
            yield from self._query_key_value(prefix, parameter.rsplit(".", 1)[1])
        elif parameter == "self_attention.linear_proj.weight":
            yield _columns(prefix + "self_attn.o_proj.weight", spec.hidden_size, _attention_width(spec) // tp, rank)
        elif parameter == "mlp.linear_fc1.weight":
            rows = spec.ffn_hidden_size // tp
            for number, name in enumerate(("gate_proj", "up_proj")):
                yield Block(
                    name=f"{prefix}mlp.{name}.weight",
                    first_row=number * rows,
                    offsets=(rank * rows, 0),
                    sizes=(rows, spec.hidden_size),
                )
        elif parameter == "mlp.linear_fc2.weight":
            yield _columns(prefix + "mlp.down_proj.weight", spec.hidden_size, spec.ffn_hidden_size // tp, rank)
        else:
            raise KeyError(f"no canonical tensor corresponds to the parameter {prefix}{parameter}")

    def _query_key_value(self, prefix: str, kind: str) -> Iterator[Block]:
        """megatron-core stacks, for each group of query heads: its queries, its key, its value."""
        spec, tp = self.spec, self.topology.tensor_parallel_size
        query_rows = spec.num_attention_heads // spec.num_query_groups * spec.head_dim
        columns = () if kind == "bias" else (spec.hidden_size,)
        groups = spec.num_query_groups // tp
        first_row = 0
        for group in range(
            self.topology.tensor_parallel_rank * groups, (self.topology.tensor_parallel_rank + 1) * groups
        ):
            for name, rows in (("q_proj", query_rows), ("k_proj", spec.head_dim), ("v_proj", spec.head_dim)):
                yield Block(
                    name=f"{prefix}self_attn.{name}.{kind}",
                    first_row=first_row,
                    offsets=(group * rows, *(0 for _ in columns)),
                    sizes=(rows, *columns),
                )
                first_row += rows


def _attention_width(spec: ModelSpec) -> int:
    return spec.num_attention_heads * spec.head_dim


def _whole(name: str, size: int) -> Block:
    return Block(name=name, first_row=0, offsets=(0,), sizes=(size,))


def _columns(name: str, rows: int, columns: int, rank: int) -> Block:
    return Block(name=name, first_row=0, offsets=(0, rank * columns), sizes=(rows, columns))
