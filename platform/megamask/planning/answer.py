"""The answer of `megamask plan`: what a plan, a search or a refusal becomes as an object (docs/guides/planning.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megamask.config.schema.layout import nearest_replicas, shared_numbers
from megamask.config.schema.roots import TrainConfig
from megamask.errors import ExitCode, UsageError
from megamask.models.counts import parameter_count
from megamask.models.spec import ModelSpec
from megamask.planning.assumptions import Assumptions
from megamask.planning.gpus import Gpu
from megamask.planning.plan import Plan, make_plan
from megamask.planning.search import search
from megamask.planning.subject import Subject

_MAX_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Request:
    """The command line's options beside the config.

    Args:
        gpu_name: of the table in planning/gpus.py.
        num_gpus: None means as many as the layout needs.
        vocab_size: None means that of the corpus.
        assume: `name=number` arguments.
    """

    gpu_name: str
    num_gpus: int | None = None
    rank: int | None = None
    is_search: bool = False
    vocab_size: int | None = None
    assume: Sequence[str] = ()


def planned_answer(
    config: TrainConfig, subject: Subject, gpu: Gpu, assumed: Assumptions, request: Request
) -> dict[str, Any]:
    """Return the answer about the layout of a config.

    Raises:
        UsageError: the layout has no rank of that number.
    """
    if request.rank is not None and not 0 <= request.rank < subject.world_size:
        raise UsageError(
            f"--rank {request.rank}: the layout has {subject.world_size} ranks; allowed: 0 to "
            f"{subject.world_size - 1}. Nothing was planned."
        )
    answer = make_plan(subject, gpu, assumed, rank=request.rank).to_json()
    if request.num_gpus is not None and request.num_gpus != subject.world_size:
        answer["reasons"] = [*answer["reasons"], _count_reason(config, subject, request.num_gpus)]
        answer["feasible"] = False
    return answer | ({} if answer["feasible"] else {"exit_code": int(ExitCode.USAGE)})


def searched_answer(
    config: TrainConfig, subject: Subject, gpu: Gpu, assumed: Assumptions, request: Request
) -> dict[str, Any]:
    """Return the answer about every layout of a number of GPUs: the fastest one, and the best others as `layouts`."""
    num_gpus = subject.world_size if request.num_gpus is None else request.num_gpus
    found = search(subject, shared_numbers(config), gpu, assumed, num_gpus)
    layouts = [_row(plan) for plan in found.fitting[:_MAX_SHOWN]]
    if found.fitting:
        answer = found.fitting[0].to_json()
    else:
        lacking = [] if found.tightest is None else list(found.tightest.reasons)
        reasons = lacking or [f"no layout of {num_gpus} GPUs divides this model, row and batch"]
        answer = {
            "feasible": False,
            "reasons": reasons,
            "world_size": num_gpus,
            "model_parameters": parameter_count(subject.spec),
            "exit_code": int(ExitCode.USAGE),
        }
    return answer | {"layouts": layouts, "num_tried": found.num_tried, "num_feasible": len(found.fitting)}


def infeasible_answer(
    config: TrainConfig, reasons: list[str], assumptions: dict[str, Any], spec: ModelSpec | None = None
) -> dict[str, Any]:
    """Return the answer about a run that cannot be planned.

    Args:
        spec: None where the settings make no network.
    """
    return {
        "feasible": False,
        "reasons": reasons,
        "world_size": config.layout.num_processes,
        "layout": asdict(config.layout.axis_sizes),
        "model_parameters": None if spec is None else parameter_count(spec),
        "assumptions": assumptions,
        "exit_code": int(ExitCode.USAGE),
    }


def _count_reason(config: TrainConfig, subject: Subject, num_gpus: int) -> str:
    nearest = nearest_replicas(config, num_gpus) or "a smaller layout"
    return (
        f"the layout needs {subject.world_size} processes, but --gpus is {num_gpus}; {nearest}; --search finds others"
    )


def _row(plan: Plan) -> dict[str, Any]:
    settings = {f"layout.{name}": value for name, value in asdict(plan.subject.axes).items()}
    settings["training.micro_batch_size"] = plan.subject.micro_batch_size
    return {
        "settings": settings,
        "total_bytes": plan.rank.total,
        "step_time_s": plan.time.total,
        "mfu": plan.mfu,
        "tokens_per_second_per_gpu": plan.tokens_per_second / plan.subject.world_size,
    }
