"""Parameters and floating-point operations of a network."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from megamask.models.shapes import TensorKind, canonical_tensors
from megamask.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class FlopsPerToken:
    """Floating-point operations per position that the network sees; a multiply-add counts two.

    Args:
        forward: one forward pass.
        training: forward and backward, three times the forward pass; recomputation is not counted.
    """

    forward: float
    training: float


@lru_cache(maxsize=64)
def parameter_count(spec: ModelSpec) -> int:
    """Trainable numbers of the canonical tensors; vocabulary padding is not counted, a tied head once."""
    return _count(spec, _numbers)


def active_parameter_count(spec: ModelSpec) -> int:
    """The numbers that one token meets: of the experts those that it visits."""
    return _count(spec, _active_numbers)


def _count(spec: ModelSpec, numbers: Callable[[ModelSpec], int]) -> int:
    """A sum over the network; layers of a kind are alike, and a spec may claim more of them than memory holds names."""
    dense = spec if spec.experts is None else dataclasses.replace(spec, experts=None)
    one, two = (numbers(dataclasses.replace(dense, num_layers=layers)) for layers in (1, 2))
    of_dense_layer = two - one
    if spec.experts is None:
        return one + (spec.num_layers - 1) * of_dense_layer
    num_dense = min(spec.experts.num_dense_layers, spec.num_layers)
    experts = dataclasses.replace(spec.experts, num_dense_layers=0)
    of_expert_layer = numbers(dataclasses.replace(spec, num_layers=1, experts=experts)) - (one - of_dense_layer)
    return one - of_dense_layer + num_dense * of_dense_layer + (spec.num_layers - num_dense) * of_expert_layer


def _numbers(spec: ModelSpec) -> int:
    """Trainable numbers: a router's bias is moved by rule, not by gradient."""
    return sum(
        math.prod(tensor.shape)
        for tensor in canonical_tensors(spec).values()
        if tensor.kind is not TensorKind.EXPERT_BIAS
    )


def _active_numbers(spec: ModelSpec) -> int:
    experts = spec.experts
    if experts is None:
        return _numbers(spec)
    layers = max(spec.num_layers - experts.num_dense_layers, 0)
    idle = experts.num_experts - experts.topk
    return _numbers(spec) - layers * idle * 3 * spec.hidden_size * experts.ffn_hidden_size


@lru_cache(maxsize=64)
def flops_per_token(spec: ModelSpec, *, scored_fraction: float = 0.5, attended_fraction: float = 1.0) -> FlopsPerToken:
    """Matrix products per processed position, for MFU.

    Attention is bidirectional, so every position attends to all `max_sequence_length` positions: twice what is usual
    for causal models. Embedding look-up, norms, rotary positions and softmax are left out, as is usual.

    Args:
        spec: the network.
        scored_fraction: part of the positions that the head scores. A complementary pair scores each token in exactly
            one of its two rows, and a single view masks one half on average: 0.5.
        attended_fraction: part of the positions that a position sees; half of them under causal attention.
    """
    matrices = _count(spec, _active_matrices)
    scores_and_mixture = (
        attended_fraction * 2 * spec.max_sequence_length * spec.num_attention_heads * spec.head_dim * spec.num_layers
    )
    head = scored_fraction * spec.vocab_size * spec.hidden_size
    forward = 2.0 * (matrices + scores_and_mixture + head)
    return FlopsPerToken(forward=forward, training=3 * forward)


def _active_matrices(spec: ModelSpec) -> int:
    """Elements of the layers' matrices that one position is multiplied with."""
    of_layers = sum(
        math.prod(tensor.shape)
        for tensor in canonical_tensors(spec).values()
        if tensor.layer is not None and len(tensor.shape) == 2
    )
    return of_layers - (_numbers(spec) - _active_numbers(spec))
