"""Bytes of parameters, gradients and optimizer state on one rank, exact.

megatron-core keeps a chunk's parameters in one buffer in reverse order, each at a multiple of 64 elements, and cuts
the buffer into equal shares for the optimizer, one for each data-parallel rank. A tied embedding on two pipeline stages
has a part of the buffer of its own. The test of this file builds the modules themselves on torch's meta device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from megamask.planning.subject import Subject

_PARAMETER_ALIGNMENT = 64  # elements; param_and_grad_buffer.py of megatron-core
_SHARE_ALIGNMENT = 128
_GRADIENT_BYTES = 4
_MOMENT_BYTES = 2 * 4
_MASTER_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class LocalTensor:
    """One parameter of a rank.

    Args:
        size: elements.
        is_shared: whether another pipeline stage holds the same one (a tied embedding).
        is_expert: whether it belongs to an expert, whose buffers other ranks share.
    """

    name: str
    size: int
    is_shared: bool = False
    is_expert: bool = False


@dataclass(frozen=True, kw_only=True)
class ParameterBytes:
    """A rank's share of parameters and of what belongs to them.

    Args:
        count: parameters that the rank computes with, padding of the buffers left out.
        updated: parameters whose optimizer state it holds.
        parameters, gradients, optimizer: bytes.
    """

    count: int
    updated: int
    parameters: int
    gradients: int
    optimizer: int


def parameter_bytes(subject: Subject, *, pipeline_rank: int, within: int) -> ParameterBytes:
    """Count what a rank holds.

    Args:
        within: number of the rank among those of its pipeline stage.
    """
    sizes = _stage_sizes(subject, pipeline_rank)
    updated = _updated(subject, sizes, within)
    has_masters = subject.compute != "fp32"
    padded = sizes.dense.padded + sizes.expert.padded
    return ParameterBytes(
        count=sizes.dense.count + sizes.expert.count,
        updated=updated,
        parameters=padded * subject.format_bytes,
        gradients=padded * _GRADIENT_BYTES,
        optimizer=updated * (_MOMENT_BYTES + (_MASTER_BYTES if has_masters else 0)),
    )


def fullest_within(subject: Subject, pipeline_rank: int) -> int:
    """Number in its stage of the first rank that holds most of the optimizer's state."""
    sizes = _stage_sizes(subject, pipeline_rank)
    return max(range(subject.ranks_of_stage), key=lambda within: _updated(subject, sizes, within))


@dataclass(frozen=True, kw_only=True)
class _BufferSizes:
    """Elements of a pipeline rank's buffers of one kind: their parameters, with padding, and those of each share."""

    count: int
    padded: int
    shares: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class _StageSizes:
    dense: _BufferSizes
    expert: _BufferSizes


def _updated(subject: Subject, sizes: _StageSizes, within: int) -> int:
    axes = subject.axes
    of_experts = axes.expert_parallel_size * axes.expert_tensor_parallel_size
    return sizes.dense.shares[within // axes.tensor_parallel_size] + sizes.expert.shares[within // of_experts]


@lru_cache(maxsize=256)
def _stage_sizes(subject: Subject, pipeline_rank: int) -> _StageSizes:
    axes = subject.axes
    of_experts = axes.expert_parallel_size * axes.expert_tensor_parallel_size
    return _StageSizes(
        dense=_buffer_sizes(subject, pipeline_rank, is_expert=False, num_shares=subject.num_shares),
        expert=_buffer_sizes(subject, pipeline_rank, is_expert=True, num_shares=subject.ranks_of_stage // of_experts),
    )


def _buffer_sizes(subject: Subject, pipeline_rank: int, *, is_expert: bool, num_shares: int) -> _BufferSizes:
    count = padded = 0
    shares = [0] * num_shares
    for chunk, layers in enumerate(subject.stages_of(pipeline_rank)):
        found = local_tensors(subject, layers, pipeline_rank=pipeline_rank, chunk=chunk)
        tensors = [tensor for tensor in found if tensor.is_expert == is_expert]
        count += sum(tensor.size for tensor in tensors)
        for start, stop, placed in _buckets(tensors, num_shares):
            padded += stop - start
            size = (stop - start) // num_shares
            for begin, end in placed:
                for share in range((begin - start) // size, (end - 1 - start) // size + 1):
                    first = start + share * size
                    shares[share] += min(end, first + size) - max(begin, first)
    return _BufferSizes(count=count, padded=padded, shares=tuple(shares))


def local_tensors(subject: Subject, layers: range, *, pipeline_rank: int, chunk: int) -> Iterator[LocalTensor]:
    """A chunk's parameters in the network's order."""
    spec, ranks = subject.spec, subject.axes.tensor_parallel_size
    of_vocabulary = spec.padded_vocab_size // ranks * spec.hidden_size
    is_first, is_last = subject.is_first(pipeline_rank, chunk), subject.is_last(pipeline_rank, chunk)
    is_shared = spec.tie_embeddings and not (is_first and is_last)
    if is_first:
        yield LocalTensor(name="embedding", size=of_vocabulary, is_shared=is_shared)
    for layer in layers:
        yield from _attention(subject)
        yield from _experts(subject) if spec.has_experts(layer) else _feed_forward(subject)
    if is_last:
        yield LocalTensor(name="final_norm", size=spec.hidden_size)
        if is_shared or not spec.tie_embeddings:
            yield LocalTensor(name="output_layer", size=of_vocabulary, is_shared=is_shared)


def _attention(subject: Subject) -> Iterator[LocalTensor]:
    spec, ranks = subject.spec, subject.axes.tensor_parallel_size
    queries = spec.num_attention_heads * spec.head_dim // ranks
    mixed = queries + 2 * spec.num_query_groups * spec.head_dim // ranks
    yield LocalTensor(name="input_norm", size=spec.hidden_size)
    yield LocalTensor(name="attention_output", size=spec.hidden_size * queries)
    yield LocalTensor(name="query_key_value", size=mixed * spec.hidden_size)
    if spec.qkv_bias:
        yield LocalTensor(name="query_key_value_bias", size=mixed)
    if spec.qk_norm:
        yield LocalTensor(name="query_norm", size=spec.head_dim)
        yield LocalTensor(name="key_norm", size=spec.head_dim)
    yield LocalTensor(name="post_attention_norm", size=spec.hidden_size)


def _feed_forward(subject: Subject) -> Iterator[LocalTensor]:
    width = subject.spec.ffn_hidden_size // subject.axes.tensor_parallel_size
    yield LocalTensor(name="gate_and_up", size=2 * width * subject.spec.hidden_size)
    yield LocalTensor(name="down", size=subject.spec.hidden_size * width)


def _experts(subject: Subject) -> Iterator[LocalTensor]:
    spec, axes = subject.spec, subject.axes
    experts = spec.experts
    assert experts is not None  # of a layer that has them
    yield LocalTensor(name="router", size=experts.num_experts * spec.hidden_size)
    width = experts.ffn_hidden_size // axes.expert_tensor_parallel_size
    count, matrix = experts.num_experts // axes.expert_parallel_size, width * spec.hidden_size
    if matrix % _PARAMETER_ALIGNMENT == 0:  # no gaps between them: one piece, so that a search stays quick
        yield LocalTensor(name="experts", size=3 * count * matrix, is_expert=True)
    else:
        for _ in range(count):
            yield LocalTensor(name="expert_gate_and_up", size=2 * matrix, is_expert=True)
            yield LocalTensor(name="expert_down", size=matrix, is_expert=True)
    if experts.shared_hidden_size:
        shared = experts.shared_hidden_size // axes.tensor_parallel_size
        yield LocalTensor(name="shared_gate_and_up", size=2 * shared * spec.hidden_size)
        yield LocalTensor(name="shared_down", size=spec.hidden_size * shared)


def _buckets(tensors: Sequence[LocalTensor], num_shares: int) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """(start, stop, [begin and end of each parameter]) of the parts of a buffer that are shared out separately."""
    unit = math.lcm(num_shares, _SHARE_ALIGNMENT)
    start = cursor = 0
    placed: list[tuple[int, int]] = []
    for tensor in reversed(tensors):
        cursor = _rounded(cursor, _PARAMETER_ALIGNMENT)
        if tensor.is_shared and placed:
            stop = _rounded(cursor, unit)
            yield start, stop, placed
            start = cursor = stop
            placed = []
        placed.append((cursor, cursor + tensor.size))
        cursor += tensor.size
        if tensor.is_shared:
            stop = _rounded(cursor, unit)
            yield start, stop, placed
            start = cursor = stop
            placed = []
    if placed:
        yield start, _rounded(cursor, unit), placed


def _rounded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
