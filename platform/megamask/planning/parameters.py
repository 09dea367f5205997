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
    """

    name: str
    size: int
    is_shared: bool = False


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


def parameter_bytes(subject: Subject, *, pipeline_rank: int, share_rank: int) -> ParameterBytes:
    """Count what a rank holds.

    Args:
        share_rank: number among the data- and context-parallel ranks, which share the optimizer's state.
    """
    sizes = _stage_sizes(subject, pipeline_rank)
    updated = sizes.shares[share_rank]
    has_masters = subject.compute != "fp32"
    return ParameterBytes(
        count=sizes.count,
        updated=updated,
        parameters=sizes.padded * subject.format_bytes,
        gradients=sizes.padded * _GRADIENT_BYTES,
        optimizer=updated * (_MOMENT_BYTES + (_MASTER_BYTES if has_masters else 0)),
    )


def fullest_share(subject: Subject, pipeline_rank: int) -> int:
    """The first of the ranks that hold most of the optimizer's state."""
    shares = _stage_sizes(subject, pipeline_rank).shares
    return max(range(len(shares)), key=shares.__getitem__)


@dataclass(frozen=True, kw_only=True)
class _StageSizes:
    """Elements of a pipeline rank: its parameters, its padded buffers, and the parameters of each share."""

    count: int
    padded: int
    shares: tuple[int, ...]


@lru_cache(maxsize=256)
def _stage_sizes(subject: Subject, pipeline_rank: int) -> _StageSizes:
    num_shares = subject.axes.data_parallel_size * subject.axes.context_parallel_size
    count = padded = 0
    shares = [0] * num_shares
    for chunk, layers in enumerate(subject.stages_of(pipeline_rank)):
        tensors = list(local_tensors(subject, layers, pipeline_rank=pipeline_rank, chunk=chunk))
        count += sum(tensor.size for tensor in tensors)
        for start, stop, placed in _buckets(tensors, num_shares):
            padded += stop - start
            size = (stop - start) // num_shares
            for begin, end in placed:
                for share in range((begin - start) // size, (end - 1 - start) // size + 1):
                    first = start + share * size
                    shares[share] += min(end, first + size) - max(begin, first)
    return _StageSizes(count=count, padded=padded, shares=tuple(shares))


def local_tensors(subject: Subject, layers: range, *, pipeline_rank: int, chunk: int) -> Iterator[LocalTensor]:
    """A chunk's parameters in the network's order."""
    spec, ranks = subject.spec, subject.axes.tensor_parallel_size
    of_vocabulary = spec.padded_vocab_size // ranks * spec.hidden_size
    is_first, is_last = subject.is_first(pipeline_rank, chunk), subject.is_last(pipeline_rank, chunk)
    is_shared = spec.tie_embeddings and not (is_first and is_last)
    if is_first:
        yield LocalTensor(name="embedding", size=of_vocabulary, is_shared=is_shared)
    for _ in layers:
        yield from _layer(subject)
    if is_last:
        yield LocalTensor(name="final_norm", size=spec.hidden_size)
        if is_shared or not spec.tie_embeddings:
            yield LocalTensor(name="output_layer", size=of_vocabulary, is_shared=is_shared)


def _layer(subject: Subject) -> Iterator[LocalTensor]:
    spec, ranks = subject.spec, subject.axes.tensor_parallel_size
    queries = spec.num_attention_heads * spec.head_dim // ranks
    mixed = queries + 2 * spec.num_query_groups * spec.head_dim // ranks
    forward = spec.ffn_hidden_size // ranks
    yield LocalTensor(name="input_norm", size=spec.hidden_size)
    yield LocalTensor(name="attention_output", size=spec.hidden_size * queries)
    yield LocalTensor(name="query_key_value", size=mixed * spec.hidden_size)
    if spec.qkv_bias:
        yield LocalTensor(name="query_key_value_bias", size=mixed)
    if spec.qk_norm:
        yield LocalTensor(name="query_norm", size=spec.head_dim)
        yield LocalTensor(name="key_norm", size=spec.head_dim)
    yield LocalTensor(name="post_attention_norm", size=spec.hidden_size)
    yield LocalTensor(name="gate_and_up", size=2 * forward * spec.hidden_size)
    yield LocalTensor(name="down", size=spec.hidden_size * forward)


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
