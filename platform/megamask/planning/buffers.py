"""Bytes of communication on one rank, beside what is communicated: buffers of the library and of megatron-core."""

from __future__ import annotations

from megamask.planning.assumptions import Assumptions
from megamask.planning.subject import Subject


def communication_bytes(subject: Subject, assumed: Assumptions) -> int:
    """Count the buffers of groups, of gathered sequences, of pipeline neighbours and of travelling tokens.

    Sums of gradients and gathered weights need none: they are made in place, in the buffers of gradients and weights.
    """
    axes, experts = subject.axes, subject.spec.experts
    row = subject.spec.hidden_size * subject.format_bytes
    found = num_groups(subject) * assumed.communicator_bytes
    if axes.sequence_parallel:
        found += subject.positions * row  # megatron-core's one buffer for inputs gathered over the tensor ranks
    if axes.pipeline_parallel_size > 1:
        found += 2 * subject.stored_positions * row  # the next input and the next gradient
    if experts is not None and axes.expert_parallel_size > 1:
        found += 2 * subject.stored_positions * experts.topk * row  # sent and received
    return int(found)


def num_groups(subject: Subject) -> int:
    """Groups of more than one rank in which a rank sends or receives: one of all ranks, and one of each axis."""
    axes = subject.axes
    sizes = (
        subject.world_size,
        axes.tensor_parallel_size,
        axes.context_parallel_size,
        subject.num_shares,
        axes.pipeline_parallel_size,
        axes.expert_parallel_size,
        axes.expert_tensor_parallel_size,
    )
    return sum(size > 1 for size in sizes)
