"""Every layout of a number of GPUs, the fitting ones by speed."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from megamask.config.rules.experts import expert_layout_problems
from megamask.config.rules.layout import PIPELINE_SPLITS, AxisSizes, Shared, layout_problems, stage_sizes
from megamask.config.rules.problem import Problem, divisors
from megamask.models.spec import ModelSpec
from megamask.planning.assumptions import Assumptions
from megamask.planning.gpus import Gpu
from megamask.planning.plan import Plan, make_plan
from megamask.planning.subject import Subject

_MAX_CHUNKS = 4
_MICRO_BATCH_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Answer of a search.

    Args:
        fitting: the plans that fit, fastest first.
        num_tried: layouts that were planned.
        tightest: where none fits, the one that lacks least memory.
    """

    fitting: list[Plan]
    num_tried: int
    tightest: Plan | None


def search(subject: Subject, shared: Shared, gpu: Gpu, assumed: Assumptions, num_gpus: int) -> SearchResult:
    """Plan every layout of that many GPUs that the rules of the layout allow.

    Tensor parallelism stays within a node: across nodes its collectives would wait for the network in every layer.
    """
    fitting, tried = list[Plan](), 0
    tightest: Plan | None = None
    for candidate in candidates(subject, shared, gpu, num_gpus):
        plan = make_plan(candidate, gpu, assumed)
        tried += 1
        if not plan.reasons:
            fitting.append(plan)
        elif tightest is None or plan.rank.total < tightest.rank.total:
            tightest = plan
    fitting.sort(key=lambda plan: (-plan.tokens_per_second, plan.rank.total))
    return SearchResult(fitting=fitting, num_tried=tried, tightest=None if fitting else tightest)


def candidates(subject: Subject, shared: Shared, gpu: Gpu, num_gpus: int) -> Iterator[Subject]:
    """The run under every layout and micro-batch size that the rules allow."""
    for axes in _layouts(subject.spec, gpu, num_gpus):
        problems = itertools.chain(layout_problems(shared, axes), _expert_problems(subject.spec, axes))
        if next(problems, None) is not None:
            continue
        group = axes.pipeline_parallel_size if axes.virtual_pipeline_parallel_size > 1 else 1
        for micro_batch_size in _MICRO_BATCH_SIZES:
            if subject.global_batch_size % (axes.data_parallel_size * micro_batch_size * group) == 0:
                yield dataclasses.replace(subject, axes=axes, micro_batch_size=micro_batch_size)


def _layouts(spec: ModelSpec, gpu: Gpu, num_gpus: int) -> Iterator[AxisSizes]:
    for tensor, context, pipeline in _dense_axes(gpu, num_gpus):
        stage = num_gpus // pipeline
        experts = 1 if spec.experts is None else math.gcd(stage, spec.experts.num_experts)
        cuts = _cuts(spec.num_layers, pipeline)
        for (virtual, split), expert in itertools.product(cuts, divisors(experts)):
            yield AxisSizes(
                tensor_parallel_size=tensor,
                pipeline_parallel_size=pipeline,
                virtual_pipeline_parallel_size=virtual,
                context_parallel_size=context,
                data_parallel_size=stage // (tensor * context),
                expert_parallel_size=expert,
                sequence_parallel=tensor > 1,
                pipeline_split=split,
            )


def _dense_axes(gpu: Gpu, num_gpus: int) -> Iterator[tuple[int, int, int]]:
    """Sizes (tensor, context, pipeline) whose product divides the GPUs."""
    for tensor in divisors(math.gcd(num_gpus, gpu.per_node)):
        for context in divisors(num_gpus // tensor):
            for pipeline in divisors(num_gpus // (tensor * context)):
                yield tensor, context, pipeline


def _cuts(num_layers: int, pipeline: int) -> Iterator[tuple[int, str]]:
    """Virtual stages and split of each different way to cut the layers."""
    seen = set()
    for virtual in range(1, _MAX_CHUNKS + 1) if pipeline > 1 else (1,):
        for split in PIPELINE_SPLITS:
            sizes = stage_sizes(num_layers, pipeline * virtual, split)
            if sizes is not None and (virtual, *sizes) not in seen:
                seen.add((virtual, *sizes))
                yield virtual, split


def _expert_problems(spec: ModelSpec, axes: AxisSizes) -> Iterator[Problem]:
    experts = spec.experts
    if experts is None:
        return iter(())
    return expert_layout_problems(
        axes,
        num_experts=experts.num_experts,
        ffn_hidden_size=experts.ffn_hidden_size,
        layers="local",
        num_layers=spec.num_layers,
        num_dense_layers=experts.num_dense_layers,
    )
