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
from megamask.diffusion.objective import (
    ObjectiveSpec,
    normalizer,
    select_rows,
    squared_sum,
    weighted_cross_entropy_sum,
)
from megamask.diffusion.philox import run_key
from megamask.diffusion.schedule import noise_schedule, stratified_times
from megamask.engine.backend import Backend
from megamask.engine.collectives import Collectives
from megamask.engine.head import MaskedRowHead, check_capacity
from megamask.engine.measures import NUM_COUNTS, NUM_SUMS, BatchCounts, Losses, count_share, sum_scores
from megamask.engine.network import DiffusionNetwork
from megamask.engine.optimizer import ShardedAdamW
from megamask.engine.topology import Topology
from megamask.models.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What a step did; the same on every rank, except for the seconds.

    Args:
        loss: what was minimised, the sum of `loss_terms`, before the update.
        loss_terms: by name; `nelbo` is the NELBO in nats per eligible token (law 3).
        grad_norm: global norm before clipping.
        is_finite: whether loss and norm were; if not, nothing was updated.
        num_eligible: clean eligible tokens of the global batch, once.
        masked_tokens: masked positions of the first view, global batch.
        masked_tokens_by_noise_level: masked positions of all views, by the band of the row's mask probability.
        loss_by_noise_level: mean cross entropy of those positions in nats, unweighted; None where there are none.
        content_sum: sum mod 2^64 of the content hashes, global batch.
        forward_backward_s, optimizer_s: seconds on this rank.
    """

    loss: float
    loss_terms: dict[str, float]
    grad_norm: float
    is_finite: bool
    num_eligible: int
    masked_tokens: int
    masked_tokens_by_noise_level: list[int]
    loss_by_noise_level: list[float | None]
    content_sum: int
    forward_backward_s: float
    optimizer_s: float


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What this rank holds of the network, where it stands, and what is minimised.

    Args:
        z_loss_weight: what log Z squared of each scored position adds to the loss; 0 for nothing.
    """

    topology: Topology
    backend: Backend
    collectives: Collectives
    network: DiffusionNetwork
    model: DistributedDataParallel
    head: MaskedRowHead
    vocabulary: Vocabulary
    objective: ObjectiveSpec
    z_loss_weight: float


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
        counts = self._agree_on_counts(batch, noised)
        num_terms = normalizer(counts.num_eligible, self._stage.objective.num_views)
        self._optimizer.zero_gradients()
        sums = self._forward_backward(batch, noised, num_terms)
        losses = Losses.from_sums(sums, counts, num_terms=num_terms, z_loss_weight=self._stage.z_loss_weight)
        self._stage.backend.synchronize()
        middle = time.perf_counter()
        grad_norm = self._optimizer.gradient_norm()
        is_doubtful = not (math.isfinite(losses.total) and math.isfinite(grad_norm))
        is_finite = not self._stage.collectives.max_integer(is_doubtful)
        if is_finite:
            self._optimizer.update(learning_rate=learning_rate, gradient_norm=grad_norm)
        self._stage.backend.synchronize()
        return StepReport(
            loss=losses.total,
            loss_terms=losses.terms,
            grad_norm=grad_norm,
            is_finite=is_finite,
            num_eligible=counts.num_eligible,
            masked_tokens=counts.masked_tokens,
            masked_tokens_by_noise_level=counts.masked_tokens_by_noise_level,
            loss_by_noise_level=losses.by_noise_level,
            content_sum=counts.content_sum,
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

    def _agree_on_counts(self, batch: Batch, noised: CorruptedBatch | None) -> BatchCounts:
        """Exact sums over the global batch, known before any forward pass."""
        stage, counts = self._stage, [0] * NUM_COUNTS
        if stage.topology.counts and noised is not None:
            counts = count_share(batch, noised, num_views=stage.objective.num_views)
        summed = stage.collectives.sum_integers(counts)
        if self._head_capacity is not None:
            self._agree_on_capacity(batch, noised, self._head_capacity)
        return BatchCounts.from_sums(summed)

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

    def _micro_batches(self, noised: CorruptedBatch | None, count: int) -> Iterator[CorruptedBatch | None]:
        num_rows = self._micro_batch_size * self._stage.objective.num_views
        for number in range(count):
            yield None if noised is None else _take(noised, slice(number * num_rows, (number + 1) * num_rows))

    def _forward_backward(self, batch: Batch, noised: CorruptedBatch | None, num_terms: int) -> list[float]:
        """Runs the pipeline schedule; returns the global sums of `measures.sum_scores`.

        Gradients in the buffers are of the loss: each micro-batch's share was divided by the global number of terms.
        """
        stage, sums = self._stage, list[torch.Tensor]()
        num_micro_batches, sequence_length = len(batch.place) // self._micro_batch_size, batch.tokens.size(1)
        capacity = min(self._head_capacity or sequence_length, sequence_length) * self._micro_batch_size
        no_count = torch.zeros((), dtype=torch.int, device=stage.backend.device)  # of megatron-core's division

        def forward_step(
            micro_batches: Iterator[CorruptedBatch | None], model: Any
        ) -> tuple[torch.Tensor, Callable[..., Any]]:
            noised = next(micro_batches)
            output = stage.network.encode(noised.x_t if noised is not None else None)
            if noised is None or not stage.topology.is_last_stage:
                return output, _no_loss
            indices, is_used = select_rows(noised.is_masked, capacity)
            row = indices // sequence_length
            weight, level = noised.weight.index_select(0, row), noised.noise_level.index_select(0, row)
            cross_entropy, log_normalizer = stage.head.score(stage.network, output, noised.x_0, indices)

            def loss_function(cross_entropy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
                sums.append(sum_scores(cross_entropy, log_normalizer, weight, level, is_used))
                share = weighted_cross_entropy_sum(cross_entropy, weight, is_used)
                if stage.z_loss_weight > 0:
                    share = share + stage.z_loss_weight * squared_sum(log_normalizer, is_used)
                return share / num_terms, no_count, {}

            return cross_entropy, loss_function

        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=self._micro_batches(noised, num_micro_batches),
            model=[stage.model],
            num_microbatches=num_micro_batches,
            seq_length=sequence_length,
            micro_batch_size=self._micro_batch_size * stage.objective.num_views,
            forward_only=False,
        )
        if stage.topology.counts:
            return stage.collectives.sum_doubles(torch.stack(sums).sum(dim=0))
        return stage.collectives.sum_doubles(torch.zeros(NUM_SUMS, dtype=torch.float64))


def _take(noised: CorruptedBatch, rows: slice) -> CorruptedBatch:
    return CorruptedBatch(
        x_t=noised.x_t[rows],
        x_0=noised.x_0[rows],
        is_masked=noised.is_masked[rows],
        weight=noised.weight[rows],
        noise_level=noised.noise_level[rows],
    )


def _no_loss(output: torch.Tensor) -> Any:
    raise AssertionError("only the last pipeline stage has a loss")
