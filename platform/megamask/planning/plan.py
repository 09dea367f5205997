"""The plan of a run: whether it fits, what fills the fullest rank, and how long a step takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megamask.models.counts import active_parameter_count, parameter_count
from megamask.planning.activations import ActivationBytes, activation_bytes
from megamask.planning.assumptions import Assumptions
from megamask.planning.buffers import communication_bytes
from megamask.planning.gpus import Gpu
from megamask.planning.operation import Operation, operation
from megamask.planning.parameters import ParameterBytes, fullest_within, parameter_bytes
from megamask.planning.step_time import StepTime, step_time
from megamask.planning.subject import Subject
from megamask.planning.work import Work, work_per_token


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """Memory of one rank at the fullest moment of a step.

    Args:
        rank: global number.
        communication: buffers of collectives.
        other: those, context of the device, gaps of the allocator.
    """

    rank: int
    held: ParameterBytes
    activations: ActivationBytes
    communication: int
    other: int

    @property
    def total(self) -> int:
        """Bytes of everything."""
        held = self.held
        return (
            held.parameters
            + held.gradients
            + held.optimizer
            + self.activations.total
            + self.activations.logits
            + self.other
        )

    def to_json(self) -> dict[str, Any]:
        """The contract's fields, and the activations by kind."""
        activations = self.activations
        return {
            "rank": self.rank,
            "parameters": self.held.count,
            "parameters_bytes": self.held.parameters,
            "gradients_bytes": self.held.gradients,
            "optimizer_bytes": self.held.optimizer,
            "activations_bytes": activations.total,
            "logits_bytes": activations.logits,
            "other_bytes": self.other,
            "communication_bytes": self.communication,
            "total_bytes": self.total,
            "activations": {
                "layers_bytes": activations.layers,
                "micro_batches_in_flight": activations.in_flight,
                "ends_bytes": activations.ends,
                "workspace_bytes": activations.workspace,
            },
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run's plan on one kind of GPU.

    Args:
        rank: the fullest rank, or the one that was asked for.
        reasons: why it does not fit; none where it does.
    """

    subject: Subject
    gpu: Gpu
    rank: RankPlan
    work: Work
    time: StepTime
    operation: Operation
    reasons: tuple[str, ...]

    @property
    def tokens_per_second(self) -> float:
        """Clean tokens per second, all ranks together."""
        return self.subject.global_batch_size * self.subject.spec.max_sequence_length / self.time.total

    @property
    def mfu(self) -> float:
        """Part of the BF16 peak that the model's operations are, recomputation not counted."""
        return self.tokens_per_second * self.work.total / (self.subject.world_size * self.gpu.bf16_flops)

    def to_json(self) -> dict[str, Any]:
        """The contract's fields but those of the config and the assumptions."""
        time, spec = self.time, self.subject.spec
        return {
            "feasible": not self.reasons,
            "reasons": list(self.reasons),
            "world_size": self.subject.world_size,
            "layout": asdict(self.subject.axes),
            "per_rank": self.rank.to_json(),
            "model_parameters": parameter_count(spec),
            "active_parameters": active_parameter_count(spec),
            "flops_per_token": self.work.total,
            "flops": asdict(self.work),
            "step_time_s": time.total,
            "step_time": asdict(time),
            "mfu": self.mfu,
            "tokens_per_second_per_gpu": self.tokens_per_second / self.subject.world_size,
            "operation": asdict(self.operation),
        }


def make_plan(subject: Subject, gpu: Gpu, assumed: Assumptions, *, rank: int | None = None) -> Plan:
    """Plan a run whose layout fits its network.

    Args:
        rank: plan this global rank; None means the fullest one.
    """
    fullest = fullest_rank(subject, assumed) if rank is None else rank_plan(subject, assumed, rank)
    time = step_time(subject, gpu, assumed)
    allowed = int(gpu.memory_bytes * (1 - assumed.reserve))
    reasons = []
    if fullest.total > allowed:
        reasons.append(
            f"rank {fullest.rank} needs {fullest.total / 1e9:.1f} GB of {allowed / 1e9:.1f} GB; the largest part is "
            f"{_largest_part(fullest)}"
        )
    return Plan(
        subject=subject,
        gpu=gpu,
        rank=fullest,
        work=work_per_token(subject),
        time=time,
        operation=operation(subject, gpu, assumed, step_s=time.total),
        reasons=tuple(reasons),
    )


def rank_plan(subject: Subject, assumed: Assumptions, rank: int) -> RankPlan:
    """Plan one global rank."""
    pipeline_rank, within = divmod(rank, subject.ranks_of_stage)
    activations = activation_bytes(subject, pipeline_rank=pipeline_rank)
    gaps = assumed.fragmentation * (activations.total + activations.logits)
    communication = communication_bytes(subject, assumed)
    return RankPlan(
        rank=rank,
        held=parameter_bytes(subject, pipeline_rank=pipeline_rank, within=within),
        activations=activations,
        communication=communication,
        other=int(assumed.context_bytes + gaps) + communication,
    )


def fullest_rank(subject: Subject, assumed: Assumptions) -> RankPlan:
    """Plan the first of the ranks that hold most."""
    plans = (
        rank_plan(subject, assumed, stage * subject.ranks_of_stage + fullest_within(subject, stage))
        for stage in range(subject.axes.pipeline_parallel_size)
    )
    return max(plans, key=lambda plan: plan.total)


def _largest_part(plan: RankPlan) -> str:
    """The largest cause and the keys that make it smaller."""
    activations = plan.activations
    parts = {
        "optimizer state (raise layout.data_parallel_size)": plan.held.optimizer,
        "parameters and gradients (raise layout.tensor_parallel_size or layout.pipeline_parallel_size)": (
            plan.held.parameters + plan.held.gradients
        ),
        f"the layers' activations of {activations.in_flight} micro-batches (lower training.micro_batch_size, or raise "
        "layout.context_parallel_size or, with layout.sequence_parallel, layout.tensor_parallel_size)": (
            activations.layers
        ),
        "logits (lower training.head_chunk_rows)": activations.logits,
    }
    name = max(parts, key=parts.__getitem__)
    return f"{parts[name] / 1e9:.1f} GB of {name}"
