"""One rank's share of a training step: rows, exact counts, forward and backward, and the loss as a sum.

Shapes: b samples of this rank, r = b*views rows, i input positions of a row, c of them on this rank (all but under
context parallelism), m positions that the head scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from megamask.diffusion.philox import run_key
from megamask.engine import passes
from megamask.engine.collectives import Collectives
from megamask.engine.measures import BatchCounts, Losses, count_share, num_counts, num_sums, sum_scores
from megamask.engine.network import DiffusionNetwork
from megamask.engine.passes import PassInput, RankModel
from megamask.engine.selection import ScoredRows, scored_counts
from megamask.objectives.base import Rows, Samples
from megamask.objectives.shapes import ObjectiveShape
from megamask.objectives.terms import Scores

if TYPE_CHECKING:
    from megamask.data.loader import Batch

Accepts = Callable[[float, float], bool]
"""Decision whether a finite loss and gradient norm let a step's update be made."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Report of a step; the same on every rank, except for the seconds.

    Args:
        loss: what was minimised, the sum of `loss_terms`, before the update.
        loss_terms: by name, each in nats per token of its own count (law 3).
        nelbo_nats_per_token: the term that bounds the negative log-likelihood; None where no term does.
        grad_norm: global norm before clipping.
        is_finite: whether loss and norm were; if not, nothing was updated.
        is_updated: whether the update was made: the numbers were finite and every rank accepted them.
        num_eligible: clean eligible tokens of the global batch, once.
        scored_tokens: scored positions of all views, global batch.
        masked_tokens: those of the first view that have a noise level.
        masked_tokens_by_noise_level: those of all views, by noise level.
        loss_by_noise_level: mean cross entropy of those positions in nats, unweighted; None where there are none.
        content_sum: sum mod 2^64 of the content hashes, global batch.
        expert_counts: tokens of the step by layer and expert, all views; None for a dense network.
        forward_backward_s, optimizer_s: seconds on this rank.
        passes_s: seconds of this rank's own passes, before it exchanges gradients with the others.
    """

    loss: float
    loss_terms: dict[str, float]
    nelbo_nats_per_token: float | None
    grad_norm: float
    is_finite: bool
    num_eligible: int
    scored_tokens: int
    masked_tokens: int
    masked_tokens_by_noise_level: list[int]
    loss_by_noise_level: list[float | None]
    content_sum: int
    forward_backward_s: float
    optimizer_s: float
    passes_s: float = 0.0
    expert_counts: list[list[int]] | None = None
    is_updated: bool = True


def accept_all(loss: float, grad_norm: float) -> bool:
    """Accept every step whose numbers are finite."""
    del loss, grad_norm
    return True


def agreed_fault(collectives: Collectives, loss: float, grad_norm: float, accepts: Accepts) -> int:
    """0 where every rank accepts the numbers of a step, 1 where one refuses them, 2 where they are not finite.

    Loss and norm are sums over all ranks, so that every rank finds alike whether they are finite.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return 2
    return 0 if accepts is accept_all else collectives.max_integer(int(not accepts(loss, grad_norm)))


def step_report(
    losses: Losses,
    counts: BatchCounts,
    *,
    grad_norm: float,
    fault: int,
    forward_backward_s: float,
    optimizer_s: float,
    passes_s: float,
) -> StepReport:
    """Return the report of a step; `fault` is that of `agreed_fault`."""
    return StepReport(
        loss=losses.total,
        loss_terms=losses.terms,
        nelbo_nats_per_token=losses.nelbo,
        grad_norm=grad_norm,
        is_finite=fault < 2,
        is_updated=not fault,
        num_eligible=counts.num_eligible,
        scored_tokens=sum(counts.num_scored),
        masked_tokens=counts.masked_tokens,
        masked_tokens_by_noise_level=counts.masked_tokens_by_noise_level,
        loss_by_noise_level=losses.by_noise_level,
        content_sum=counts.content_sum,
        expert_counts=losses.expert_counts,
        forward_backward_s=forward_backward_s,
        optimizer_s=optimizer_s,
        passes_s=passes_s,
    )


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Settings that the steps of a run have in common.

    Args:
        micro_batch_size: samples of one forward pass.
        head_chunk_rows: positions that the head computes at a time.
        seed: run.seed, the key of the noise.
    """

    micro_batch_size: int
    head_chunk_rows: int
    seed: int


class StepShare:
    """This rank's share of one step: its rows, their counts, and their passes through the network."""

    def __init__(self, rank_model: RankModel, settings: StepSettings, batch: Batch, *, step: int) -> None:
        self._rank_model = rank_model
        self._settings = settings
        self._batch = batch
        mesh, device = rank_model.mesh, rank_model.backend.device
        self._objective = objective = rank_model.objective.at(step)
        samples = Samples(
            tokens=batch.tokens.to(device, non_blocking=True).to(torch.int64),  # stored as 2 or 4 bytes until here
            is_eligible=batch.is_eligible.to(device, non_blocking=True),
            sample_index=batch.sample_index.to(device, non_blocking=True),
            batch_position=batch.batch_position.tolist(),
            global_batch_size=len(batch.batch_position) * mesh.data_parallel_size,
        )
        key = run_key(settings.seed)
        samples = objective.seen(samples, key)
        self._is_eligible = samples.is_eligible
        # The first stage reads the inputs and the last one the targets; both make them alike, and no rank sends any.
        self._rows: Rows | None = None
        if mesh.is_first_stage or mesh.is_last_stage:
            self._rows = objective.rows(samples, step, key)
        self._context = self._rows.context if self._rows is not None else objective.context(samples, step, key)
        self._shape: ObjectiveShape = objective.shape(batch.tokens.size(1))
        self._part = rank_model.part(self._shape.input_length)

    def agree_on_counts(self) -> BatchCounts:
        """Exact sums over the global batch, known before any forward pass."""
        rank_model, counts = self._rank_model, [0] * num_counts(self._objective)
        if rank_model.mesh.is_counting_rank and self._rows is not None:
            counts = count_share(self._batch, self._is_eligible, self._rows, self._objective)
        return BatchCounts.from_sums(rank_model.collectives.sum_integers(counts))

    def _own_rows(self) -> Rows | None:
        """The rows that this rank reads and scores: of each, its part under context parallelism."""
        if self._rows is None or self._part is None:
            return self._rows
        return self._part.of_rows(self._rows)

    @property
    def num_rows(self) -> int:
        """Rows of the global batch, all views."""
        return len(self._batch.batch_position) * self._rank_model.mesh.data_parallel_size * self._shape.num_views

    @property
    def _num_micro_batches(self) -> int:
        return len(self._batch.batch_position) // self._settings.micro_batch_size

    @property
    def _rows_per_pass(self) -> int:
        return self._settings.micro_batch_size * self._shape.num_views

    def _micro_batches(self) -> list[slice]:
        size = self._rows_per_pass
        return [slice(number * size, (number + 1) * size) for number in range(self._num_micro_batches)]

    def _inputs(self, rows: slice) -> torch.Tensor | None:
        return None if self._rows is None else self._rows.inputs[rows]

    def forward_backward(self, counts: BatchCounts) -> torch.Tensor:
        """Run the pipeline schedule; return this rank's share of the sums that `losses` reads, float64 [n].

        Gradients in the buffers are of the loss: each micro-batch's share of a term was divided by that term's N.
        """
        rank_model, objective = self._rank_model, self._objective
        own = self._own_rows()
        capacity = self._settings.micro_batch_size * self._shape.scored_positions
        normalizers = [term.normalizer(counts.of_terms) for term in objective.terms]
        slices, sums = self._micro_batches(), list[torch.Tensor]()
        num_scored = list[int]()
        if rank_model.mesh.is_last_stage and own is not None:
            num_scored = scored_counts(own.is_scored, len(slices))
            capacity = min(capacity, own.is_scored[: self._rows_per_pass].numel())

        def share(scores: Scores) -> torch.Tensor:
            shares = [
                term.factor * term.share(scores) / count
                for term, count in zip(objective.terms, normalizers, strict=True)
            ]
            return sum(shares[1:], start=shares[0])

        def loss_share(network: DiffusionNetwork, hidden: torch.Tensor, number: int) -> torch.Tensor:
            assert own is not None  # the last stage made them
            scored = ScoredRows.of(
                own.rows(slices[number]),
                capacity=capacity,
                num_scored=num_scored[number],
                chunk_rows=self._settings.head_chunk_rows,
            )
            loss, scores = rank_model.head.loss(network, hidden, scored, share)
            sums.append(sum_scores(objective, scores, scored.group))
            return loss

        passes.train(
            rank_model,
            [PassInput(inputs=self._inputs(rows), context=self._context.rows(rows)) for rows in slices],
            loss_share,
            shape=(self._rows_per_pass, self._shape.input_length),
        )
        of_rank = torch.zeros(num_sums(objective), dtype=torch.float64, device=rank_model.backend.device)
        if rank_model.mesh.is_metrics_rank:
            of_rank = torch.stack(sums).sum(dim=0)
        if (routing := rank_model.routing) is None:
            return of_rank
        # each rank routed other tokens or other layers; counts are exact in float64 as far as 2^53
        of_router = torch.cat((routing.balance.reshape(1), routing.counts.flatten())).double()
        return torch.cat((of_rank, of_router.to(of_rank.device)))

    def losses(self, sums: Sequence[float], counts: BatchCounts) -> Losses:
        """Read the sums of `forward_backward`, added up over the ranks."""
        num_own = num_sums(self._objective)
        losses = Losses.from_sums(sums[:num_own], counts, self._objective)
        if (routing := self._rank_model.routing) is None:
            return losses
        balance, *flat = sums[num_own:]
        num_layers, num_experts = routing.counts.shape
        by_layer = [
            [int(count) for count in flat[layer * num_experts : (layer + 1) * num_experts]]
            for layer in range(num_layers)
        ]
        terms = losses.terms
        if routing.experts.balance_weight > 0:
            terms = terms | {"balance": balance}
        return replace(losses, terms=terms, expert_counts=by_layer)
