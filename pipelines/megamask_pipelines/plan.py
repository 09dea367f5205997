"""The job of `megamask plan`: memory, time and fitness of a run on GPUs, before any is booked."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megamask.config.identity import value_of
from megamask.config.load import DEFAULT_ORIGIN, Loaded
from megamask.config.rules.block_schedule import block_schedule_problems
from megamask.config.schema.layout import nearest_replicas, shared_numbers
from megamask.config.schema.roots import TrainConfig
from megamask.config.validate import all_problems
from megamask.config.variants import variant_problems
from megamask.data.manifest import Manifest
from megamask.errors import DataIntegrityError, ExitCode, MegamaskError, UsageError
from megamask.models.counts import parameter_count
from megamask.models.spec import ModelSpec
from megamask.objectives.schedule import largest_shape, phases_of
from megamask.planning.assumptions import Assumptions
from megamask.planning.capability import planned
from megamask.planning.capability import problems as capability_problems
from megamask.planning.gpus import Gpu, gpu_named
from megamask.planning.plan import Plan, make_plan
from megamask.planning.search import search
from megamask.planning.subject import Subject
from megamask.training.batch_size import first_step

ASSUMED_VOCABULARY = 131_072
_MOST_SHOWN = 10


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


def plan_run(loaded: Loaded[TrainConfig], request: Request) -> dict[str, Any]:
    """Plan a composed config; nothing is written and no device is touched.

    Returns: the contract's object (docs/guides/planning.md), with exit_code 2 when the run does not fit.
    Raises:
        UsageError: an argument that is not a GPU, assumption or rank.
    """
    config, gpu = loaded.config, gpu_named(request.gpu_name)
    assumed = Assumptions.with_overrides(request.assume)
    problems = itertools.chain(
        variant_problems(config, loaded.origins, default_origin=DEFAULT_ORIGIN),
        all_problems(config),
        capability_problems(
            config.precision, config.device, planned(gpu.architecture), num_experts=config.model.num_experts
        ),
    )
    reasons = [problem.description(value_of(config, problem.key)) for problem in problems]
    vocab_size, vocab_origin = _vocabulary(config, request.vocab_size)
    assumptions = {
        "gpu": {"value": request.gpu_name, **asdict(gpu)},
        "vocab_size": {"value": vocab_size, "meaning": vocab_origin},
        **assumed.to_json(),
    }
    try:
        spec = ModelSpec.from_config(config.model, vocab_size, config.training.sequence_length)
    except UsageError as error:
        return _infeasible(config, reasons or [error.message], assumptions)
    if request.is_search:
        return _searched(config, spec, gpu, assumed, request) | {"assumptions": assumptions}
    if reasons:
        return _infeasible(config, reasons, assumptions, spec)
    return _planned(config, spec, gpu, assumed, request) | {"assumptions": assumptions}


def _planned(config: TrainConfig, spec: ModelSpec, gpu: Gpu, assumed: Assumptions, request: Request) -> dict[str, Any]:
    subject = subject_of(config, spec)
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


def _searched(config: TrainConfig, spec: ModelSpec, gpu: Gpu, assumed: Assumptions, request: Request) -> dict[str, Any]:
    subject = subject_of(config, spec)
    num_gpus = subject.world_size if request.num_gpus is None else request.num_gpus
    found = search(subject, shared_numbers(config), gpu, assumed, num_gpus)
    layouts = [_row(plan) for plan in found.fitting[:_MOST_SHOWN]]
    if found.fitting:
        answer = found.fitting[0].to_json()
    else:
        lacking = [] if found.tightest is None else list(found.tightest.reasons)
        reasons = lacking or [f"no layout of {num_gpus} GPUs divides this model, row and batch"]
        answer = {
            "feasible": False,
            "reasons": reasons,
            "world_size": num_gpus,
            "model_parameters": parameter_count(spec),
            "exit_code": int(ExitCode.USAGE),
        }
    return answer | {"layouts": layouts, "num_tried": found.num_tried, "num_feasible": len(found.fitting)}


def subject_of(config: TrainConfig, spec: ModelSpec) -> Subject:
    """The numbers that a plan reads of a config."""
    training = config.training
    objective, length = config.objective, training.sequence_length
    settings = objective.settings()
    if any(block_schedule_problems(objective.block_schedule, length)):  # a search ignores what no layout can mend
        settings["block_schedule"] = []
    phases = phases_of(settings, length, lambda amount, unit: first_step(amount, unit, training))
    shape = largest_shape(phases, length)
    return Subject(
        spec=spec,
        shape=shape,
        axes=config.layout.axis_sizes,
        global_batch_size=training.global_batch_size,
        micro_batch_size=training.micro_batch_size,
        compute=config.precision.compute,
        head_rows=shape.scored_positions,
        head_chunk_rows=training.head_chunk_rows,
        has_fp8=config.precision.fp8 != "none",
        recompute=training.recompute,
        is_overlapped=config.device.overlap_gradient_reduce,
        checkpoint_every_steps=config.checkpoint.every_steps,
    )


def _vocabulary(config: TrainConfig, given: int | None) -> tuple[int, str]:
    """Entries of the vocabulary, and where the number is from."""
    if given is not None:
        return given, "--vocab-size"
    for name, folder in config.data.corpora.items():
        try:
            return Manifest.load(Path(folder)).vocab_size, f"data.corpora.{name} = {folder}"
        except (MegamaskError, DataIntegrityError, OSError):
            continue
    return ASSUMED_VOCABULARY, "assumed, because no corpus of data.corpora can be read here; --vocab-size replaces it"


def _infeasible(
    config: TrainConfig, reasons: list[str], assumptions: dict[str, Any], spec: ModelSpec | None = None
) -> dict[str, Any]:
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
