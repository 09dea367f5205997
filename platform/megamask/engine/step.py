"""One training step: noise, forward and backward under the layout, one sum, a guard, an update.

Shapes: b samples of this rank, r = b*views rows, s sequence, m positions that the head scores.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from megamask.data.loader import Batch
from megamask.diffusion.corruption import CorruptedBatch, corrupt
from megamask.diffusion.objective import ObjectiveSpec, normalizer, select_rows, weighted_cross_entropy_sum
from megamask.diffusion.philox import run_key
from megamask.diffusion.schedule import noise_schedule, stratified_times
from megamask.engine.backend import Backend
from megamask.engine.collectives import Collectives
from megamask.engine.head import MaskedRowHead, check_capacity
from megamask.engine.network import DiffusionNetwork
from megamask.engine.optimizer import ShardedAdamW
from megamask.engine.topology import Topology
from megamask.models.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What a step did; the same on every rank, except for the seconds.

    Args:
        loss: NELBO in nats per eligible token (law 3), before the update.
        grad_norm: global norm before clipping.
        is_finite: whether loss and norm were; if not, nothing was updated.
        num_eligible: clean eligible tokens of the global batch, once.
        masked_tokens: masked positions of the first view, global batch.
        content_sum: sum mod 2^64 of the content hashes, global batch.
        forward_backward_s, optimizer_s: seconds on this rank.
    """

    loss: float
    grad_norm: float
    is_finite: bool
    num_eligible: int
    masked_tokens: int
    content_sum: int
    forward_backward_s: float
    optimizer_s: float


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What this rank holds of the network, and where it stands."""

    topology: Topology
    backend: Backend
    collectives: Collectives
    network: DiffusionNetwork
    model: DistributedDataParallel
    head: MaskedRowHead
    vocabulary: Vocabulary
    objective: ObjectiveSpec


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Rows of one forward pass; `num_terms` is this micro-batch's part of the loss's divisor."""

    noised: CorruptedBatch | None
    num_terms: int


class TrainingStep:
    """Takes steps on one rank; every rank of the job must take the same ones.

    Args:
        micro_batch_size: samples of one forward pass.
        head_capacity: positions per sample that the head computes; None means the whole sequence.
        seed: run.seed, the key of the noise.
    """

    def __init__(
        self, stage: Stage, optimizer: ShardedAdamW, *, micro_batch_size: int, head_capacity: int | None, seed: int
    ) -> None:
        self._stage = stage
        self._optimizer = optimizer
        self._micro_batch_size = micro_batch_size
        self._head_capacity = head_capacity
        self._key = run_key(seed)
        self._schedule = noise_schedule(stage.objective.noise_schedule)

    def run(self, batch: Batch, *, step: int, learning_rate: float) -> StepReport:
        """Takes one step.

        Args:
            step: 1-based.
            learning_rate: of this step.

        Raises:
            UsageError: a micro-batch masks more positions than training.head_capacity, on every rank alike.
        """
        began = time.perf_counter()
        noised = self._corrupt(batch, step)
        num_eligible, masked_tokens, content_sum = self._agree_on_counts(batch, noised)
        num_terms = normalizer(num_eligible, self._stage.objective.num_views)
        self._optimizer.zero_gradients()
        loss = self._forward_backward(batch, noised) / num_terms
        self._stage.backend.synchronize()
        middle = time.perf_counter()
        grad_norm = self._optimizer.gradient_norm()
        num_doubtful = self._stage.collectives.max_integer(not (math.isfinite(loss) and math.isfinite(grad_norm)))
        if not num_doubtful:
            self._optimizer.update(learning_rate=learning_rate, gradient_norm=grad_norm)
        self._stage.backend.synchronize()
        return StepReport(
            loss=loss,
            grad_norm=grad_norm,
            is_finite=not num_doubtful,
            num_eligible=num_eligible,
            masked_tokens=masked_tokens,
            content_sum=content_sum,
            forward_backward_s=middle - began,
            optimizer_s=time.perf_counter() - middle,
        )

    def _corrupt(self, batch: Batch, step: int) -> CorruptedBatch | None:
        """The noise of this rank's samples. The first and the last stage make it alike; nobody else needs it."""
        stage = self._stage
        if not (stage.topology.is_first_stage or stage.topology.is_last_stage):
            return None
        global_batch_size = len(batch.place) * stage.topology.data_parallel_size
        times = stratified_times(step, global_batch_size, self._key)
        return corrupt(
            batch.tokens.to(stage.backend.device),
            batch.is_eligible.to(stage.backend.device),
            batch.sample_index.to(stage.backend.device),
            [times[place] for place in batch.place.tolist()],
            schedule=self._schedule,
            complementary=stage.objective.complementary,
            mask_token_id=stage.vocabulary.mask_token_id,
            key=self._key,
        )

    def _agree_on_counts(self, batch: Batch, noised: CorruptedBatch | None) -> tuple[int, int, int]:
        """Exact sums over the global batch, known before any forward pass: eligible, masked (first view), content."""
        stage, counts = self._stage, [0, 0, 0, 0]
        if stage.topology.counts and noised is not None:
            first_view = noised.is_masked[:: stage.objective.num_views]
            low, high = batch.content_sum & 0xFFFFFFFF, batch.content_sum >> 32
            counts = [int(batch.is_eligible.sum()), int(first_view.sum()), low, high]
        num_eligible, masked_tokens, low, high = stage.collectives.sum_integers(counts)
        if self._head_capacity is not None:
            self._agree_on_capacity(batch, noised, self._head_capacity)
        return num_eligible, masked_tokens, (low + (high << 32)) % 2**64

    def _agree_on_capacity(self, batch: Batch, noised: CorruptedBatch | None, head_capacity: int) -> None:
        largest = 0
        if noised is not None:
            num_micro_batches = len(batch.place) // self._micro_batch_size
            largest = int(noised.is_masked.reshape(num_micro_batches, -1).sum(dim=1).max())
        check_capacity(
            self._stage.collectives.max_integer(largest),
            head_capacity * self._micro_batch_size,
            micro_batch_size=self._micro_batch_size,
        )

    def _micro_batches(self, batch: Batch, noised: CorruptedBatch | None) -> Iterator[MicroBatch]:
        size, views = self._micro_batch_size, self._stage.objective.num_views
        for first in range(0, len(batch.place), size):
            num_eligible = int(batch.is_eligible[first : first + size].sum())
            rows = slice(first * views, (first + size) * views)
            yield MicroBatch(
                noised=None if noised is None else _take(noised, rows),
                num_terms=num_eligible * views,
            )

    def _forward_backward(self, batch: Batch, noised: CorruptedBatch | None) -> float:
        """Runs the pipeline schedule; returns the global sum of weight * cross entropy, in float64.

        Gradients in the buffers are of that sum divided by the global number of terms: megatron-core adds up the
        counts that `loss_function` returns and divides once.
        """
        stage, sums = self._stage, list[torch.Tensor]()
        sequence_length = batch.tokens.size(1)
        capacity = min(self._head_capacity or sequence_length, sequence_length) * self._micro_batch_size

        def forward_step(micro_batches: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
            micro_batch = next(micro_batches)
            noised = micro_batch.noised
            output = stage.network.encode(noised.x_t if noised is not None else None)
            if noised is None or not stage.topology.is_last_stage:
                return output, _no_loss
            indices, is_used = select_rows(noised.is_masked, capacity)
            weights = noised.weight.index_select(0, indices // noised.x_0.size(1))

            def loss_function(cross_entropy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
                detached = torch.where(is_used, cross_entropy.detach(), 0.0).double()
                sums.append((detached * weights.double()).sum())
                share = weighted_cross_entropy_sum(cross_entropy, weights, is_used)
                return share, torch.tensor(micro_batch.num_terms, dtype=torch.int, device=share.device), {}

            return stage.head.cross_entropy(stage.network, output, noised.x_0, indices), loss_function

        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=self._micro_batches(batch, noised),
            model=[stage.model],
            num_microbatches=len(batch.place) // self._micro_batch_size,
            seq_length=sequence_length,
            micro_batch_size=self._micro_batch_size * stage.objective.num_views,
            forward_only=False,
        )
        share = float(torch.stack(sums).sum()) if stage.topology.counts else 0.0
        return stage.collectives.sum_double(share)


def _take(noised: CorruptedBatch, rows: slice) -> CorruptedBatch:
    return CorruptedBatch(
        x_t=noised.x_t[rows], x_0=noised.x_0[rows], is_masked=noised.is_masked[rows], weight=noised.weight[rows]
    )


def _no_loss(output: torch.Tensor) -> Any:
    raise AssertionError("only the last pipeline stage has a loss")
