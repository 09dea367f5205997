"""Demands of a run on its surroundings: checkpoints, data, and the part of the time that survives failures."""

from __future__ import annotations

from dataclasses import dataclass

from megamask.models.counts import parameter_count
from megamask.planning.assumptions import Assumptions
from megamask.planning.gpus import Gpu
from megamask.planning.parameters import fullest_within, parameter_bytes
from megamask.planning.subject import Subject

_STATE_BYTES = 3 * 4  # float32 weight and two moments
_DAY_S = 86400.0


@dataclass(frozen=True, kw_only=True)
class Operation:
    """Rates and sizes beside the training itself.

    Args:
        checkpoint_bytes: of one checkpoint, all ranks together.
        checkpoint_share_bytes: largest share of a rank.
        checkpoint_stall_s: training waits for the copy to the host's memory.
        checkpoint_write_s: from the copy to the commit, beside training.
        checkpoint_interval_s: between two saves; None without checkpoint.every_steps.
        checkpoint_bandwidth: bytes per second on average over the interval, all nodes together; None likewise.
        data_bandwidth: bytes per second of token ids, all ranks together.
        ettr: expected part of the time spent on steps that count (effective training time ratio); None likewise.
        failures_per_day: of the whole job.
    """

    checkpoint_bytes: int
    checkpoint_share_bytes: int
    checkpoint_stall_s: float
    checkpoint_write_s: float
    checkpoint_interval_s: float | None
    checkpoint_bandwidth: float | None
    data_bandwidth: float
    ettr: float | None
    failures_per_day: float


def operation(subject: Subject, gpu: Gpu, assumed: Assumptions, *, step_s: float) -> Operation:
    """Estimate from the seconds of a step.

    A failure costs the restart, the save that was being written, and on average half an interval of steps
    (Young 1974; Meta, arXiv:2410.21680, section 3).
    """
    nodes = -(-subject.world_size // gpu.per_node)
    total = _STATE_BYTES * parameter_count(subject.spec)
    share = _STATE_BYTES * max(
        parameter_bytes(subject, pipeline_rank=rank, within=fullest_within(subject, rank)).updated
        for rank in range(subject.axes.pipeline_parallel_size)
    )
    stall = share / assumed.host_copy_bandwidth
    on_node = share * min(gpu.per_node, subject.world_size)
    write = max(on_node / assumed.storage_bandwidth, total / assumed.storage_total_bandwidth)
    failures = nodes * assumed.failures_per_node_day
    tokens_per_s = subject.global_batch_size * subject.spec.max_sequence_length / step_s
    every = subject.checkpoint_every_steps
    interval = None if every is None else every * step_s + stall
    ettr = None
    if interval is not None:
        lost = assumed.restart_s + interval / 2 + write
        ettr = (1 - stall / interval) / (1 + failures / _DAY_S * lost)
    return Operation(
        checkpoint_bytes=total,
        checkpoint_share_bytes=share,
        checkpoint_stall_s=stall,
        checkpoint_write_s=write,
        checkpoint_interval_s=interval,
        checkpoint_bandwidth=None if interval is None else total / interval,
        data_bandwidth=tokens_per_s * (2 if subject.spec.vocab_size <= 1 << 16 else 4),
        ettr=ettr,
        failures_per_day=failures,
    )
