"""Forward-only prediction under the run's layout: what previews during training ask of the engine.

Neither the model nor logits are gathered: each tensor-parallel rank scores its own slice of the vocabulary, four
numbers a position travel between them, two a position to the other pipeline stages.

Shapes: r rows, s positions of a row, m open positions of all rows, v vocabulary entries of a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megamask.diffusion.sampling import Draw, Prediction, choose, score_slice
from megamask.engine.step import Stage

_LOGIT_ROWS = 128  # rows of [.., v] float64 logits and noise at a time


@torch.no_grad()
def predict(stage: Stage, x_t: torch.Tensor, is_open: torch.Tensor, draw: Draw, *, rows_per_pass: int) -> Prediction:
    """Chooses a token for every open position; leaves weights, gradients and Adam's state alone.

    All ranks of a data-parallel coordinate call this with the same rows; coordinates may have different ones, or call
    it more or less often. Neither the mask token nor padding is ever chosen or takes part in the probabilities.

    Shapes: x_t int64 [r, s]; is_open bool [r, s]; the answer, of the open positions row by row, lies on the CPU and is
    the same on all those ranks.
    """
    num_rows, sequence_length = x_t.shape
    rows_per_pass = min(rows_per_pass, num_rows)
    padding = -num_rows % rows_per_pass  # every pass has the same shape; nothing is open in rows that fill it up
    is_open = _fill_up(is_open.to(stage.backend.device), padding)
    tokens = _fill_up(x_t.to(stage.backend.device), padding)
    sequences = (*draw.sequences, *[0] * padding)
    scores: list[torch.Tensor] = []

    def forward_step(passes: Iterator[slice], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        rows = next(passes)
        output = stage.network.encode(tokens[rows])

        def keep_scores(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
            scores.append(_scores(stage, hidden, is_open[rows], replace(draw, sequences=sequences[rows])))
            return hidden.new_zeros(()), torch.tensor(1, dtype=torch.int, device=hidden.device), {}

        return output, keep_scores

    num_passes = (num_rows + padding) // rows_per_pass
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter([slice(n * rows_per_pass, (n + 1) * rows_per_pass) for n in range(num_passes)]),
        model=[stage.model],
        num_microbatches=num_passes,
        seq_length=sequence_length,
        micro_batch_size=rows_per_pass,
        forward_only=True,
    )
    return _share(stage, torch.cat(scores, dim=1) if scores else None, num_open=int(is_open.sum()))


def _scores(stage: Stage, hidden: torch.Tensor, is_open: torch.Tensor, draw: Draw) -> torch.Tensor:
    """[4, m] answers of this rank's slice of the vocabulary, for the rows of one pass; hidden [s, r, h]."""
    vocabulary, topology = stage.vocabulary, stage.topology
    size = vocabulary.padded_vocab_size // topology.tensor_parallel_size
    first_token = topology.tensor_parallel_rank * size
    ids = torch.arange(first_token, first_token + size, device=hidden.device)
    is_excluded = ids >= vocabulary.vocab_size
    is_excluded |= (ids == vocabulary.mask_token_id) | (ids == vocabulary.pad_token_id)
    parts = [
        score_slice(
            stage.head.logits(stage.network, hidden, indices),
            indices,
            num_positions=is_open.size(1),
            vocab_size=vocabulary.vocab_size,
            first_token=first_token,
            is_excluded=is_excluded,
            draw=draw,
        )
        for indices in torch.split(is_open.flatten().nonzero()[:, 0], _LOGIT_ROWS)
    ]
    return torch.cat(parts, dim=1)


def _share(stage: Stage, scores: torch.Tensor | None, *, num_open: int) -> Prediction:
    """The choice over the whole vocabulary, from the tensor-parallel ranks of the last stage to every stage."""
    answer = torch.zeros(2, num_open, dtype=torch.float64, device=stage.backend.device)
    if scores is not None:
        slices = scores.new_empty(stage.topology.tensor_parallel_size, *scores.shape)
        dist.all_gather(list(slices), scores, group=parallel_state.get_tensor_model_parallel_group())
        chosen = choose(slices)
        answer = torch.stack((chosen.tokens.to(torch.float64), chosen.confidence))
    if stage.topology.pipeline_parallel_size > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(answer, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    tokens, confidence = answer.cpu()
    return Prediction(tokens=tokens.to(torch.int64), confidence=confidence)


def _fill_up(tensor: torch.Tensor, num_rows: int) -> torch.Tensor:
    return torch.cat((tensor, tensor.new_zeros(num_rows, tensor.size(1)))) if num_rows else tensor
