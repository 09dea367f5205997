"""Seconds of a step: computing, communication that nothing hides, and the pipeline's idle time, apart.

A model of rates, not a simulation: every figure is work divided by a rate of planning/gpus.py and an efficiency of
planning/assumptions.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from megamask.planning.activations import stored_by_layer
from megamask.planning.assumptions import Assumptions
from megamask.planning.gpus import Gpu
from megamask.planning.parameters import parameter_bytes
from megamask.planning.subject import Subject
from megamask.planning.work import Work, work_per_token

_PASSES_OVER_ACTIVATIONS = 4  # written once, read by the next operation, by its gradient and by the neighbour's
_UPDATE_BYTES = 30  # read and write master and moments, read the gradient, write the weight
_GRADIENT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step on the slowest pipeline rank.

    Args:
        compute: matrices, attention, head, element-wise work, recomputation and the update.
        tensor, context, expert, pipeline, data: communication on each axis that nothing hides.
        bubble: idle time of the pipeline.
    """

    compute: float
    tensor: float
    context: float
    expert: float
    pipeline: float
    data: float
    bubble: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.compute + self.communication + self.bubble

    @property
    def communication(self) -> float:
        """Seconds of communication that nothing hides."""
        return self.tensor + self.context + self.expert + self.pipeline + self.data


def step_time(subject: Subject, gpu: Gpu, assumed: Assumptions) -> StepTime:
    """Estimate a step; the pipeline rank that takes longest for a micro-batch sets the pace."""
    work = work_per_token(subject)
    candidates = [
        _step_time(subject, gpu, assumed, work, pipeline_rank=rank)
        for rank in range(subject.axes.pipeline_parallel_size)
    ]
    return max(candidates, key=lambda time: time.total)


def _step_time(subject: Subject, gpu: Gpu, assumed: Assumptions, work: Work, *, pipeline_rank: int) -> StepTime:
    axes, micro_batches = subject.axes, subject.num_micro_batches
    layers = sum(len(stage) for stage in subject.stages_of(pipeline_rank))
    compute = _compute(subject, gpu, assumed, work, layers=layers, pipeline_rank=pipeline_rank)
    tensor = layers * _tensor_parallel(subject, gpu, assumed)
    context = layers * _context_parallel(subject, gpu, assumed)
    expert = sum(
        _expert_parallel(subject, gpu, assumed)
        for stage in subject.stages_of(pipeline_rank)
        for layer in stage
        if subject.spec.has_experts(layer)
    )
    pipeline = _pipeline_parallel(subject, gpu, assumed)
    updated = parameter_bytes(subject, pipeline_rank=pipeline_rank, within=0).updated
    update = updated * _UPDATE_BYTES / (gpu.memory_bandwidth * assumed.memory_efficiency)
    idle = (axes.pipeline_parallel_size - 1) / axes.virtual_pipeline_parallel_size
    return StepTime(
        compute=micro_batches * compute + update,
        tensor=micro_batches * tensor,
        context=micro_batches * context,
        expert=micro_batches * expert,
        pipeline=micro_batches * pipeline,
        data=_data_parallel(subject, gpu, assumed, pipeline_rank=pipeline_rank),
        bubble=idle * (compute + tensor + context + expert + pipeline),
    )


def _compute(subject: Subject, gpu: Gpu, assumed: Assumptions, work: Work, *, layers: int, pipeline_rank: int) -> float:
    """Seconds that one micro-batch computes on a rank, forward and backward."""
    axes, spec = subject.axes, subject.spec
    peak = gpu.fp32_flops if subject.compute == "fp32" else gpu.bf16_flops
    tokens = subject.micro_batch_size * spec.max_sequence_length
    share = tokens / (axes.tensor_parallel_size * axes.context_parallel_size)
    head = 0.0
    of_layers = share * layers / spec.num_layers
    matrices, attention = of_layers * work.matrices, of_layers * work.attention
    if subject.recompute == "full":
        matrices, attention = matrices * 4 / 3, attention * 4 / 3
    elif subject.recompute == "selective":
        matrices, attention = matrices * (1 + _dense_part(subject) / 3), attention * 4 / 3
    if subject.is_last(pipeline_rank, axes.virtual_pipeline_parallel_size - 1):
        head = share * work.head
    # a rank's products have one row a position: short pieces of a row keep the units waiting
    efficiency = assumed.matrix_efficiency
    of_matrices = peak
    if subject.has_fp8 and gpu.fp8_flops is not None:
        efficiency, of_matrices = assumed.fp8_efficiency, gpu.fp8_flops
    rate = efficiency * subject.positions / (subject.positions + assumed.half_rate_rows)
    moved = _PASSES_OVER_ACTIVATIONS * sum(
        stored_by_layer(subject, layer, is_complete=True)
        for stage in subject.stages_of(pipeline_rank)
        for layer in stage
    )
    return (
        matrices / (of_matrices * rate)
        + head / (peak * assumed.matrix_efficiency)
        + attention / (peak * assumed.attention_efficiency)
        + moved / (gpu.memory_bandwidth * assumed.memory_efficiency)
    )


def _dense_part(subject: Subject) -> float:
    """Part of the layers' matrix products that dense feed-forward parts have."""
    spec = subject.spec
    attention = 2 * (spec.num_attention_heads + spec.num_query_groups) * spec.head_dim
    dense = total = 0
    for layer in range(spec.num_layers):
        if spec.has_experts(layer) and spec.experts is not None:
            total += 3 * (spec.experts.topk * spec.experts.ffn_hidden_size + spec.experts.shared_hidden_size)
        else:
            dense += 3 * spec.ffn_hidden_size
    return dense / (dense + total + spec.num_layers * attention)


def _tensor_parallel(subject: Subject, gpu: Gpu, assumed: Assumptions) -> float:
    """Seconds of one layer's collectives: two all-reduces, or what replaces them, in each direction."""
    axes = subject.axes
    ranks = axes.tensor_parallel_size
    if ranks == 1:
        return 0.0
    activation = subject.positions * subject.spec.hidden_size * subject.format_bytes
    part = (ranks - 1) / ranks
    moved, calls = 4 * 2 * part * activation, 4
    if axes.sequence_parallel:  # the backward pass gathers the inputs of both column-parallel matrices again
        moved, calls = moved + 2 * part * activation, 10
    return moved / _bandwidth(gpu, assumed, extent=ranks) + calls * assumed.collective_latency_s


def _context_parallel(subject: Subject, gpu: Gpu, assumed: Assumptions) -> float:
    """Seconds of one layer's keys and values: gathered forward, their gradients scattered backward."""
    axes, spec = subject.axes, subject.spec
    ranks = axes.context_parallel_size
    if ranks == 1:
        return 0.0
    channels = 2 * spec.num_query_groups * spec.head_dim // axes.tensor_parallel_size
    moved = 2 * (ranks - 1) * subject.positions * channels * subject.format_bytes
    extent = ranks * axes.tensor_parallel_size
    return moved / _bandwidth(gpu, assumed, extent=extent) + 2 * assumed.collective_latency_s


def _expert_parallel(subject: Subject, gpu: Gpu, assumed: Assumptions) -> float:
    """Seconds in which a layer's tokens travel to their experts and back, and their gradients likewise."""
    axes, experts = subject.axes, subject.spec.experts
    ranks = axes.expert_parallel_size
    if ranks == 1 or experts is None:
        return 0.0
    row = subject.spec.hidden_size * subject.format_bytes
    moved = 4 * (ranks - 1) / ranks * subject.stored_positions * experts.topk * row
    extent = ranks * axes.expert_tensor_parallel_size
    return moved / _bandwidth(gpu, assumed, extent=extent) + 4 * assumed.collective_latency_s


def _pipeline_parallel(subject: Subject, gpu: Gpu, assumed: Assumptions) -> float:
    """Seconds in which a micro-batch travels to the next stage and its gradient back, for every chunk."""
    axes = subject.axes
    if axes.pipeline_parallel_size == 1:
        return 0.0
    moved = 2 * subject.stored_positions * subject.spec.hidden_size * subject.format_bytes
    each = moved / _bandwidth(gpu, assumed, extent=subject.world_size) + 2 * assumed.collective_latency_s
    return axes.virtual_pipeline_parallel_size * each


def _data_parallel(subject: Subject, gpu: Gpu, assumed: Assumptions, *, pipeline_rank: int) -> float:
    """Seconds of the gradients' sum and of the new weights' way back, once a step."""
    axes = subject.axes
    ranks = axes.data_parallel_size * axes.context_parallel_size
    if ranks == 1:
        return 0.0
    held = parameter_bytes(subject, pipeline_rank=pipeline_rank, within=0)
    moved = (ranks - 1) / ranks * (held.gradients + held.parameters)
    extent = ranks * axes.tensor_parallel_size
    seconds = moved / _bandwidth(gpu, assumed, extent=extent) + 2 * assumed.collective_latency_s
    return seconds * (1 - assumed.overlapped_part) if subject.is_overlapped else seconds


def _bandwidth(gpu: Gpu, assumed: Assumptions, *, extent: int) -> float:
    """Bytes per second of a group whose ranks lie within `extent` neighbouring ones."""
    link = gpu.node_bandwidth if extent <= gpu.per_node else gpu.network_bandwidth
    return link * assumed.link_efficiency
