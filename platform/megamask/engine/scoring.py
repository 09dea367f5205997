"""Forward-only passes under the run's layout: what evaluation and previews during training ask of the engine.

Neither the model nor logits are gathered: to choose a token, each tensor-parallel rank scores its own slice of the
vocabulary, four numbers a position travel between them, two a position to the other pipeline stages.

Shapes: r rows, i input positions of a row, c of them on this rank (all but under context parallelism), h hidden
channels, m chosen positions of all rows.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from megamask.diffusion.sampling import Draw, Prediction, choose, score_slice
from megamask.engine import passes
from megamask.engine.network import DiffusionNetwork
from megamask.engine.passes import PassInput, RankModel
from megamask.engine.selection import ScoredRows, scored_counts
from megamask.objectives.base import Reading, Rows, filled_up, never_written

_LOGIT_ROWS = 128  # rows of [.., v] float64 logits and noise at a time


@torch.no_grad()
def score(rank_model: RankModel, rows: Rows, *, rows_per_pass: int, chunk_rows: int) -> torch.Tensor:
    """Sum of weight * cross entropy over each row's scored positions; training's state is unchanged.

    All ranks of a data-parallel coordinate call this with the same rows; coordinates may have different ones.

    Returns: float64 [r] on the CPU, in nats, the same on all those ranks.
    """
    num_rows, num_positions = rows.inputs.shape
    if num_rows == 0:
        return torch.zeros(0, dtype=torch.float64)
    # every pass has the same shape; nothing is scored in rows that fill it up
    rows = filled_up(rows.to(rank_model.backend.device), -num_rows % rows_per_pass)
    slices, part = _passes(len(rows.inputs), rows_per_pass), rank_model.part(num_positions)
    own = rows if part is None else part.of_rows(rows)
    num_scored = scored_counts(own.is_scored, len(slices))

    def row_sums(network: DiffusionNetwork, hidden: torch.Tensor, number: int) -> torch.Tensor:
        of_pass = own.rows(slices[number])
        scored = ScoredRows.of(
            of_pass, capacity=of_pass.is_scored.numel(), num_scored=num_scored[number], chunk_rows=chunk_rows
        )
        scores = rank_model.head.score(network, hidden, scored)
        flat = torch.zeros(of_pass.is_scored.numel(), dtype=torch.float64, device=hidden.device)
        flat[scored.indices] = torch.where(scores.is_used, scores.cross_entropy, 0.0).double()
        weighted = flat.reshape(of_pass.is_scored.shape) * of_pass.weight.to(torch.float64)
        return weighted.sum(dim=1)

    found = passes.forward_only(
        rank_model,
        [PassInput(inputs=rows.inputs[part], context=rows.context.rows(part)) for part in slices],
        row_sums,
        shape=(rows_per_pass, num_positions),
    )
    sums = torch.zeros(len(rows.inputs), dtype=torch.float64, device=rank_model.backend.device)
    if found:
        sums = rank_model.groups.sum_over_context(torch.cat(found))
    return passes.share_with_stages(rank_model, sums)[:num_rows].cpu()


@torch.no_grad()
def predict(rank_model: RankModel, reading: Reading, draw: Draw, *, rows_per_pass: int) -> Prediction:
    """Choose a token for every position read; training's state is unchanged.

    All ranks of a data-parallel coordinate call this with the same rows; coordinates may have different ones, or call
    it more or less often. Neither the mask token nor padding is ever chosen or takes part in the probabilities.

    Returns: of the positions read, row by row, on the CPU, the same on all those ranks.
    """
    num_rows, num_positions = reading.inputs.shape
    rows_per_pass = min(rows_per_pass, num_rows)
    reading = reading.to(rank_model.backend.device)
    is_read = reading.is_read
    # every pass has the same shape; nothing is read in rows that fill it up
    order = torch.arange(num_rows + -num_rows % rows_per_pass, device=is_read.device) % num_rows
    inputs, context = reading.inputs[order], reading.context.rows(order)
    slices, part = _passes(len(order), rows_per_pass), rank_model.part(num_positions)
    places = torch.arange(num_positions, device=is_read.device) if part is None else part.places

    def scores(network: DiffusionNetwork, hidden: torch.Tensor, number: int) -> torch.Tensor:
        rows = slice(slices[number].start, min(slices[number].stop, num_rows))
        of_pass = replace(draw, sequences=draw.sequences[rows])
        return _scores(rank_model, network, hidden, is_read[rows][:, places], places, reading, of_pass)

    found = passes.forward_only(
        rank_model,
        [PassInput(inputs=inputs[part], context=context.rows(part)) for part in slices],
        scores,
        shape=(rows_per_pass, num_positions),
    )
    # of all positions read, those that this rank has answers for
    is_own = torch.zeros_like(is_read)
    is_own[:, places] = True
    return _choose_together(rank_model, torch.cat(found, dim=1) if found else None, is_own[is_read])


def _scores(
    rank_model: RankModel,
    network: DiffusionNetwork,
    hidden: torch.Tensor,
    is_read: torch.Tensor,
    places: torch.Tensor,
    reading: Reading,
    draw: Draw,
) -> torch.Tensor:
    """[4, m] answers of this rank's slice of the vocabulary, for the rows of one pass.

    Shapes: hidden [c, r, h]; is_read [r, c] of this rank's positions; places [c] of these in the row.
    """
    vocabulary, head, num_positions = rank_model.vocabulary, rank_model.head, is_read.size(1)
    never = head.columns_without(never_written(vocabulary))
    parts = [
        score_slice(
            head.logits(network, hidden, indices),
            places[indices % num_positions] + reading.shift,
            indices // num_positions,
            num_positions=reading.num_positions,
            vocab_size=vocabulary.vocab_size,
            first_token=head.first_id,
            is_excluded=never,
            draw=draw,
        )
        for indices in torch.split(is_read.flatten().nonzero()[:, 0], _LOGIT_ROWS)
    ]
    return torch.cat(parts, dim=1)


def _choose_together(rank_model: RankModel, scores: torch.Tensor | None, is_own: torch.Tensor) -> Prediction:
    """The choice over all of the vocabulary, from the tensor-parallel ranks of the last stage to every stage.

    Args:
        is_own: bool, of the positions read: those that `scores` answers for.
    """
    answer = torch.zeros(2, is_own.numel(), dtype=torch.float64, device=rank_model.backend.device)
    if scores is not None:
        chosen = choose(rank_model.groups.gather_over_tensor(scores))
        answer[:, is_own] = torch.stack((chosen.tokens.to(torch.float64), chosen.confidence))
        rank_model.groups.sum_over_context(answer)  # each position has one answer that is not 0
    tokens, confidence = passes.share_with_stages(rank_model, answer).cpu()
    return Prediction(tokens=tokens.to(torch.int64), confidence=confidence)


def _passes(num_rows: int, rows_per_pass: int) -> list[slice]:
    return [slice(first, first + rows_per_pass) for first in range(0, num_rows, rows_per_pass)]
