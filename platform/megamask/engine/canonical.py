"""Slices of canonical tensors that each local parameter holds: integer arithmetic on a model and a mesh.

Canonical names and shapes are those of models/shapes.py. A local parameter is a stack of row groups; each is a
rectangle of one canonical tensor. The initial weights, the checkpoint and the tests read the same slices, so a layout
that is wrong in one place is wrong in all and shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megamask.engine.mesh import Mesh
from megamask.engine.specs.base import LayerPart, Part
from megamask.models.shapes import (
    EMBEDDING_NAME,
    EXPERT_BIAS_NAME,
    HEAD_NAME,
    ROUTER_NAME,
    SHARED_PREFIX,
    expert_prefix,
)
from megamask.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class TensorSlice:
    """Rows [first_row, first_row + sizes[0]) of a local parameter, equal to a rectangle of a canonical tensor.

    Args:
        name: the canonical tensor.
        first_row: the first of the rows in the local parameter.
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


def vocabulary_slices(spec: ModelSpec, mesh: Mesh, *, is_head: bool) -> tuple[TensorSlice, ...]:
    """The real rows of this rank's shard of the embedding or of the head; its padding rows are in no slice."""
    name = HEAD_NAME if is_head and not spec.tie_embeddings else EMBEDDING_NAME
    rows = spec.padded_vocab_size // mesh.tensor_parallel_size
    first = mesh.tensor_parallel_rank * rows
    real = min(rows, spec.vocab_size - first)
    if real <= 0:
        return ()
    return (TensorSlice(name=name, first_row=0, offsets=(first, 0), sizes=(real, spec.hidden_size)),)


def replicated(name: str, size: int) -> tuple[TensorSlice, ...]:
    """A vector that every tensor-parallel rank holds."""
    return (TensorSlice(name=name, first_row=0, offsets=(0,), sizes=(size,)),)


def layer_slices(part: LayerPart, prefix: str, spec: ModelSpec, mesh: Mesh) -> tuple[TensorSlice, ...]:
    """The slices of one part of a layer on this rank.

    Args:
        prefix: of the canonical names of the layer.
    """
    hidden = spec.hidden_size
    if isinstance(part, tuple):
        return _expert_slices(*part, prefix, spec, mesh)
    if part in (Part.ROUTER, Part.EXPERT_BIAS, Part.SHARED_GATE_AND_UP, Part.SHARED_DOWN):
        return _slices_beside_experts(part, prefix, spec, mesh)
    if part in _REPLICATED:
        is_of_heads = part in (Part.QUERY_NORM, Part.KEY_NORM)
        return replicated(prefix + _REPLICATED[part], spec.head_dim if is_of_heads else hidden)
    tensor = _Share(rank=mesh.tensor_parallel_rank, size=mesh.tensor_parallel_size)
    if part is Part.ATTENTION_OUTPUT:
        return _columns(f"{prefix}self_attn.o_proj.weight", hidden, spec.num_attention_heads * spec.head_dim, tensor)
    if part is Part.DOWN:
        return _columns(f"{prefix}mlp.down_proj.weight", hidden, spec.ffn_hidden_size, tensor)
    if part is Part.GATE_AND_UP:
        return tuple(_gate_and_up(f"{prefix}mlp.", hidden, spec.ffn_hidden_size, tensor))
    return tuple(_query_key_value(prefix, "bias" if part is Part.QUERY_KEY_VALUE_BIAS else "weight", spec, mesh))


_REPLICATED = {
    Part.INPUT_NORM: "input_layernorm.weight",
    Part.POST_ATTENTION_NORM: "post_attention_layernorm.weight",
    Part.QUERY_NORM: "self_attn.q_norm.weight",
    Part.KEY_NORM: "self_attn.k_norm.weight",
}


@dataclass(frozen=True, kw_only=True)
class _Share:
    """The one of equal shares of a matrix that a rank holds."""

    rank: int
    size: int


def _expert_slices(part: Part, expert: int, prefix: str, spec: ModelSpec, mesh: Mesh) -> tuple[TensorSlice, ...]:
    assert spec.experts is not None  # a layer has experts
    width = spec.experts.ffn_hidden_size
    share = _Share(rank=mesh.expert_tensor_parallel_rank, size=mesh.expert_tensor_parallel_size)
    prefix += expert_prefix(expert)
    if part is Part.EXPERT_DOWN:
        return _columns(f"{prefix}down_proj.weight", spec.hidden_size, width, share)
    return tuple(_gate_and_up(prefix, spec.hidden_size, width, share))


def _slices_beside_experts(part: Part, prefix: str, spec: ModelSpec, mesh: Mesh) -> tuple[TensorSlice, ...]:
    """Router, its bias, and the part that every token visits."""
    assert spec.experts is not None  # a layer has experts
    hidden, num_experts, width = spec.hidden_size, spec.experts.num_experts, spec.experts.shared_hidden_size
    share = _Share(rank=mesh.tensor_parallel_rank, size=mesh.tensor_parallel_size)
    if part is Part.ROUTER:
        return (TensorSlice(name=prefix + ROUTER_NAME, first_row=0, offsets=(0, 0), sizes=(num_experts, hidden)),)
    if part is Part.EXPERT_BIAS:
        return replicated(prefix + EXPERT_BIAS_NAME, num_experts)
    prefix += SHARED_PREFIX
    if part is Part.SHARED_DOWN:
        return _columns(f"{prefix}down_proj.weight", hidden, width, share)
    return tuple(_gate_and_up(prefix, hidden, width, share))


def _gate_and_up(prefix: str, hidden: int, width: int, share: _Share) -> Iterator[TensorSlice]:
    rows = width // share.size
    for number, name in enumerate(("gate_proj", "up_proj")):
        yield TensorSlice(
            name=f"{prefix}{name}.weight",
            first_row=number * rows,
            offsets=(share.rank * rows, 0),
            sizes=(rows, hidden),
        )


def _query_key_value(prefix: str, kind: str, spec: ModelSpec, mesh: Mesh) -> Iterator[TensorSlice]:
    """megatron-core stacks, for each group of query heads: its queries, its key, its value."""
    query_rows = spec.num_attention_heads // spec.num_query_groups * spec.head_dim
    columns = () if kind == "bias" else (spec.hidden_size,)
    groups = spec.num_query_groups // mesh.tensor_parallel_size
    first_row = 0
    for group in range(mesh.tensor_parallel_rank * groups, (mesh.tensor_parallel_rank + 1) * groups):
        for name, rows in (("q_proj", query_rows), ("k_proj", spec.head_dim), ("v_proj", spec.head_dim)):
            yield TensorSlice(
                name=f"{prefix}self_attn.{name}.{kind}",
                first_row=first_row,
                offsets=(group * rows, *(0 for _ in columns)),
                sizes=(rows, *columns),
            )
            first_row += rows


def _columns(name: str, rows: int, columns: int, share: _Share) -> tuple[TensorSlice, ...]:
    mine = columns // share.size
    return (TensorSlice(name=name, first_row=0, offsets=(0, share.rank * mine), sizes=(rows, mine)),)
