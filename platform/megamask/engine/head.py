"""The head: logits, cross entropy and their gradients at the scored positions only, chunk by chunk.

Each chunk of `training.head_chunk_rows` rows is finished before the next one begins: its logits, its softmax, its share
of the loss and the gradients that follow from it. Logits of a micro-batch never exist together, the backward pass
computes no matrix product twice, and chunks without a scored row are not computed.

Shapes: r rows, i input positions, h hidden, m rows of the head (selection.py), c rows of a chunk, v padded vocabulary,
tp ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from megamask.engine.cross_entropy import ShardedSoftmax
from megamask.engine.divergence import Shard, ShardedDivergence
from megamask.engine.gradients import taken
from megamask.engine.mesh import Mesh, ProcessGroups
from megamask.engine.network import DiffusionNetwork
from megamask.engine.selection import ScoredRows
from megamask.models.vocabulary import Vocabulary
from megamask.objectives.base import is_excluded, never_written
from megamask.objectives.terms import Scores

Share = Callable[[Scores], torch.Tensor]
"""Scores of some positions -> their share of the loss, a scalar with gradients; shares of disjoint positions add up."""


class ScoredRowHead:
    """Scores positions of the last stage's hidden states over the real vocabulary.

    Args:
        excluded_ids: ids that never enter the softmax (`Objective.excluded_ids`); columns that pad the vocabulary do
            not either, on any layout.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        excluded_ids: frozenset[int],
        mesh: Mesh,
        groups: ProcessGroups,
        device: torch.device,
    ) -> None:
        shard = vocabulary.padded_vocab_size // mesh.tensor_parallel_size
        self.group = groups.tensor
        self.first_id = mesh.tensor_parallel_rank * shard
        self._ids = torch.arange(self.first_id, self.first_id + shard, device=device)
        self._vocabulary = vocabulary
        self._is_excluded = self.columns_without(excluded_ids)
        self._shard = Shard(
            first_id=self.first_id,
            is_excluded=self._is_excluded,
            can_be_noise=~self.columns_without(never_written(vocabulary)),
            group=self.group,
        )

    def columns_without(self, excluded_ids: frozenset[int]) -> torch.Tensor:
        """Bool [v/tp]: columns of this rank that take no part in a softmax without these ids."""
        return is_excluded(self._ids, self._vocabulary, excluded_ids)

    def loss(
        self, network: DiffusionNetwork, hidden: torch.Tensor, scored: ScoredRows, share: Share
    ) -> tuple[torch.Tensor, Scores]:
        """Share of the loss, a scalar with gradients of the hidden states and of the output layer, and the scores.

        All tensor-parallel ranks call this together, with the same rows. Shapes: hidden [i, r, h].
        """
        chunks = list[Scores]()
        total: torch.Tensor = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
            hidden, network.output_weight(), self, scored, share, chunks
        )
        return total, _joined(chunks)

    @torch.no_grad()
    def score(self, network: DiffusionNetwork, hidden: torch.Tensor, scored: ScoredRows) -> Scores:
        """Scores of the rows, without gradients. Shapes: hidden [i, r, h]."""
        return _joined([scores for _, _, scores, _ in self.chunks(hidden, network.output_weight(), scored)])

    def logits(self, network: DiffusionNetwork, hidden: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Logits of this rank's slice of the vocabulary at the chosen positions, its padding columns included.

        Shapes: hidden [i, r, h]; indices [m] into the flattened r*i positions; returns [m, v/tp].
        """
        return _rows_of(hidden, indices) @ network.output_weight().t()

    def chunks(
        self, hidden: torch.Tensor, weight: torch.Tensor, scored: ScoredRows
    ) -> Iterator[tuple[slice, torch.Tensor, Scores, ShardedSoftmax | ShardedDivergence]]:
        """Place, hidden rows [c, h], scores and costs of one chunk after the other."""
        for chunk in scored.chunks():
            rows = _rows_of(hidden, scored.indices[chunk])
            costs = self._costs(rows @ weight.t(), scored, chunk)
            scores = Scores(
                cross_entropy=costs.cross_entropy,
                log_normalizer=costs.log_normalizer,
                weight=scored.weight[chunk],
                part=None if scored.part is None else scored.part[chunk],
                is_used=scored.is_used[chunk],
            )
            yield chunk, rows, scores, costs
            del rows, scores, costs  # two chunks never exist together

    def _costs(self, logits: torch.Tensor, scored: ScoredRows, chunk: slice) -> ShardedSoftmax | ShardedDivergence:
        """Cross entropies, or the divergences of interpolating noise. Shapes: logits [c, v/tp]."""
        if scored.noised is None:
            return ShardedSoftmax(logits, scored.targets[chunk], self._is_excluded, self.first_id, self.group)
        return ShardedDivergence(
            logits, scored.targets[chunk], scored.read[chunk], scored.noised.rows(chunk), self._shard
        )


class _ChunkedLoss(torch.autograd.Function):
    """Computes the gradients beside the loss, so that the backward pass only scales and distributes them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        head: ScoredRowHead,
        scored: ScoredRows,
        share: Share,
        found: list[Scores],
    ) -> torch.Tensor:
        of_rows = hidden.new_empty(len(scored.indices), hidden.size(-1))
        of_weight: torch.Tensor | None = None
        total = hidden.new_zeros((), dtype=torch.float32)
        pending = list[Any]()
        for chunk, rows, scores, costs in head.chunks(hidden, weight, scored):
            part, of_cross_entropy, of_log_normalizer = _differentiate(share, scores)
            total += part
            found.append(scores)
            of_logits = costs.logit_gradient(of_cross_entropy, of_log_normalizer)  # [c, v/tp]
            torch.mm(of_logits, weight, out=of_rows[chunk])
            if dist.get_world_size(head.group) > 1:  # each rank has its own columns; the next chunk need not wait
                pending.append(dist.all_reduce(of_rows[chunk], group=head.group, async_op=True))
            of_weight = _add_product(of_weight, of_logits, rows)
            del rows, costs, of_logits
        for work in pending:
            work.wait()
        ctx.weight, ctx.shape = weight, hidden.shape
        ctx.save_for_backward(of_rows, of_weight, scored.indices)
        return total

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None, None, None]:
        of_rows, of_weight, indices = ctx.saved_tensors
        of_hidden = spread(of_rows.mul_(scale), _in_sequence_order(indices, ctx.shape), ctx.shape)
        weight = ctx.weight
        if weight.dtype == torch.float32:
            return of_hidden, of_weight.mul_(scale), None, None, None, None
        if hasattr(weight, "main_grad"):  # the float32 sum stays float32
            weight.main_grad.addcmul_(of_weight, scale)
            return of_hidden, taken(weight), None, None, None, None
        return of_hidden, of_weight.mul_(scale).to(weight.dtype), None, None, None, None


def spread(rows: torch.Tensor, places: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Put rows at their places and zeros elsewhere. Shapes: rows [m, h], int64 [m] -> shape [i, r, h].

    By the inverse permutation: each position reads its row, so that no order of sums is involved.
    """
    num_rows, num_places = len(places), shape[0] * shape[1]
    source = torch.full((num_places,), num_rows, device=places.device)
    source[places] = torch.arange(num_rows, device=places.device)
    is_given = (source < num_rows).unsqueeze(-1)
    return torch.where(is_given, rows.index_select(0, source.clamp_(max=num_rows - 1)), 0.0).view(shape)


def _differentiate(share: Share, scores: Scores) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Share of the loss, and its gradients by cross entropy and by log Z, float32 [c] each."""
    with torch.enable_grad():
        cross_entropy = scores.cross_entropy.detach().requires_grad_()
        log_normalizer = scores.log_normalizer.detach().requires_grad_()
        part = share(
            Scores(
                cross_entropy=cross_entropy,
                log_normalizer=log_normalizer,
                weight=scores.weight,
                part=scores.part,
                is_used=scores.is_used,
            )
        )
        of_cross_entropy, of_log_normalizer = torch.autograd.grad(
            part, (cross_entropy, log_normalizer), allow_unused=True, materialize_grads=True
        )
    return part.detach(), of_cross_entropy, of_log_normalizer


def _add_product(total: torch.Tensor | None, of_logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Float32 total + of_logits^T rows, [v/tp, h]."""
    if of_logits.dtype != torch.float32:
        product = (of_logits.t() @ rows).float()
        return product if total is None else total.add_(product)
    return of_logits.t() @ rows if total is None else total.addmm_(of_logits.t(), rows)


def _rows_of(hidden: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Hidden states at places of the flattened r*i positions. Shapes: [i, r, h], int64 [m] -> [m, h]."""
    return hidden.reshape(-1, hidden.size(-1)).index_select(0, _in_sequence_order(indices, hidden.shape))


def _in_sequence_order(indices: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Places (position, row) of [i, r], in which the network keeps its states, for places (row, position) of [r, i]."""
    sequence_length, num_rows = shape[:2]
    return indices % sequence_length * num_rows + indices // sequence_length


def _joined(chunks: list[Scores]) -> Scores:
    first = chunks[0]
    if len(chunks) == 1:
        return first
    return Scores(
        cross_entropy=torch.cat([scores.cross_entropy for scores in chunks]),
        log_normalizer=torch.cat([scores.log_normalizer for scores in chunks]),
        weight=torch.cat([scores.weight for scores in chunks]),
        part=None if first.part is None else torch.cat([s.part for s in chunks if s.part is not None]),
        is_used=torch.cat([scores.is_used for scores in chunks]),
    )
