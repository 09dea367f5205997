"""Every layout of a number of GPUs, the fitting ones by speed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from megamask.config.rules.layout import PIPELINE_SPLITS, AxisSizes, Shared, layout_problems
from megamask.config.rules.problem import divisors
from megamask.planning.assumptions import Assumptions
from megamask.planning.gpus import Gpu
from megamask.planning.plan import Plan, make_plan
from megamask.planning.subject import Subject

_MOST_CHUNKS = 8
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
    for axes in _layouts(gpu, num_gpus):
        if next(layout_problems(shared, axes), None) is not None:
            continue
        group = axes.pipeline_parallel_size if axes.virtual_pipeline_parallel_size > 1 else 1
        for micro_batch_size in _MICRO_BATCH_SIZES:
            if subject.global_batch_size % (axes.data_parallel_size * micro_batch_size * group) == 0:
                yield dataclasses.replace(subject, axes=axes, micro_batch_size=micro_batch_size)


def _layouts(gpu: Gpu, num_gpus: int) -> Iterator[AxisSizes]:
    for tensor in divisors(math.gcd(num_gpus, gpu.per_node)):
        for context in divisors(num_gpus // tensor):
            for pipeline in divisors(num_gpus // (tensor * context)):
                for virtual in range(1, _MOST_CHUNKS + 1) if pipeline > 1 else (1,):
                    for split in PIPELINE_SPLITS if pipeline > 1 else PIPELINE_SPLITS[:1]:
                        yield AxisSizes(
                            tensor_parallel_size=tensor,
                            pipeline_parallel_size=pipeline,
                            virtual_pipeline_parallel_size=virtual,
                            context_parallel_size=context,
                            data_parallel_size=num_gpus // (tensor * context * pipeline),
                            sequence_parallel=tensor > 1,
                            pipeline_split=split,
                        )
