"""Faults of a layout that were made on purpose: each is planted in every rank for the length of one case."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch.distributed as dist

from support import parity_cases as parity

NUM_STEPS = 2
DATA, CONTEXT = {"data_parallel_size": 2}, {"context_parallel_size": 2}
SEQUENCE = {"tensor_parallel_size": 2, "sequence_parallel": True}
UNEVEN = {"pipeline_parallel_size": 3, "pipeline_split": "balanced"}


@contextlib.contextmanager
def divisor_of_one_rank() -> Iterator[None]:
    """The loss is divided by the tokens of half the batch."""
    from megamask.engine.measures import BatchCounts
    from megamask.objectives.terms import Counts

    halved = property(lambda self: Counts(num_eligible=self.num_eligible // 2, num_scored=self.num_scored))
    with mock.patch.object(BatchCounts, "of_terms", halved):
        yield


@contextlib.contextmanager
def masks_keyed_by_rank() -> Iterator[None]:
    """The key of the noise is another one on each rank."""
    from megamask.engine import step

    plain = step.run_key
    with mock.patch.object(step, "run_key", lambda seed: plain(seed + dist.get_rank())):
        yield


@contextlib.contextmanager
def no_sequence_parallel_sum() -> Iterator[None]:
    """Gradients of norms, of parts of the sequence, are not added up."""
    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")  # a function has its name
    with mock.patch.object(module, "_allreduce_non_tensor_model_parallel_grads", lambda *a, **k: None):
        yield


@contextlib.contextmanager
def middle_stage_without_positions() -> Iterator[None]:
    """A stage between the first and the last one gets rows without positions and documents."""
    from megamask.engine.layers.attention import RowContext
    from megamask.models.context import Context

    plain = RowContext.__init__

    def forgetful(self: Any, context: Context, part: Any = None) -> None:
        is_middle = 0 < dist.get_rank() < dist.get_world_size() - 1
        plain(self, Context(pattern=context.pattern) if is_middle else context, part)

    with mock.patch.object(RowContext, "__init__", forgetful):
        yield


@contextlib.contextmanager
def first_positions_for_every_part() -> Iterator[None]:
    """Queries of a part of the row are turned by the angles of the row's first positions."""
    from megamask.engine.layers.attention import RowContext

    def misaligned(self: Any, angles: Any) -> Any:
        return tuple(tensor[..., : len(self.part.places), :] for tensor in angles)

    with mock.patch.object(RowContext, "own", misaligned):
        yield


@contextlib.contextmanager
def experts_not_updated() -> Iterator[None]:
    """The experts' own optimizer takes no step."""
    from megamask.engine.optimizer import ShardedAdamW

    plain = ShardedAdamW.update

    def partial(self: Any, **arguments: Any) -> None:
        everything, self._sharded = self._sharded, self._sharded[:1]
        plain(self, **arguments)
        self._sharded = everything

    with mock.patch.object(ShardedAdamW, "update", partial):
        yield


@contextlib.contextmanager
def first_chunk_for_every_stage() -> Iterator[None]:
    """A rank runs its first stage wherever the schedule asks for a later one."""
    from megamask.engine import passes

    plain = passes.get_forward_backward_func

    def schedule() -> Callable[..., Any]:
        def run(**arguments: Any) -> Any:
            step, first = arguments["forward_step_func"], arguments["model"][0]
            return plain()(**arguments | {"forward_step_func": lambda data, chunk: step(data, first)})

        return run

    with mock.patch.object(passes, "get_forward_backward_func", schedule):
        yield


FAULTS: dict[str, tuple[Callable[[], Any], str, dict[str, Any]]] = {
    "wrong loss divisor under data parallelism": (divisor_of_one_rank, "dense", DATA),
    "masks keyed by rank": (masks_keyed_by_rank, "dense", DATA),
    "missing sum of sequence-parallel gradients": (no_sequence_parallel_sum, "dense", SEQUENCE),
    "context slice misaligned with rotary positions": (first_positions_for_every_part, "dense", CONTEXT),
    "optimizer of the experts skipped": (experts_not_updated, "moe", DATA | {"expert_parallel_size": 2}),
    "positions of a middle stage dropped": (middle_stage_without_positions, "packed", UNEVEN),
    "first chunk for every virtual stage": (
        first_chunk_for_every_stage,
        "dense",
        {"pipeline_parallel_size": 2, "virtual_pipeline_parallel_size": 2},
    ),
}


def run(faults: list[str]) -> list[list[list[dict[str, Any]]]]:
    """Of each fault the reports without it and with it."""
    found = []
    for name in faults:
        plant, kind, layout = FAULTS[name]
        plain = parity.run_case(kind, layout, NUM_STEPS)
        with plant():
            found.append([plain, parity.run_case(kind, layout, NUM_STEPS)])
    return found


def single(kinds: list[str]) -> list[list[dict[str, Any]]]:
    """The reports of one process."""
    return [parity.run_case(kind, {}, NUM_STEPS) for kind in kinds]
