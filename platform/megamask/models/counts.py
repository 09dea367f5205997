"""Parameters and floating-point operations of a network."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from megamask.models.shapes import canonical_shapes, canonical_tensors
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


def parameter_count(spec: ModelSpec) -> int:
    """Trainable numbers of the canonical tensors; vocabulary padding is not counted, a tied head once."""
    one, two = (_numbers(dataclasses.replace(spec, num_layers=layers)) for layers in (1, 2))
    return one + (spec.num_layers - 1) * (two - one)  # layers are alike; a spec may claim more than memory holds names


def _numbers(spec: ModelSpec) -> int:
    return sum(math.prod(shape) for shape in canonical_shapes(spec).values())


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
    matrices = sum(
        math.prod(tensor.shape)
        for tensor in canonical_tensors(spec).values()
        if tensor.layer is not None and len(tensor.shape) == 2
    )
    scores_and_mixture = (
        attended_fraction * 2 * spec.max_sequence_length * spec.num_attention_heads * spec.head_dim * spec.num_layers
    )
    head = scored_fraction * spec.vocab_size * spec.hidden_size
    forward = 2.0 * (matrices + scores_and_mixture + head)
    return FlopsPerToken(forward=forward, training=3 * forward)
