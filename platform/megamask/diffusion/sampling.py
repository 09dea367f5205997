"""Choice of a token for a masked position, over a vocabulary that may lie in slices on several ranks.

The most probable token, or with a temperature the Gumbel-max trick (LLaDA, arXiv:2502.09992): noise is added to the
logits in float64, for in float32 it would cut off rare tokens. Noise follows the noise law (purpose 6: index = sequence
number, draw = denoising step, from 1), so a choice is a function of seed, sequence, position and logits alone.

Each rank scores its own slice; four numbers a position are all that ranks exchange, never logits.

Shapes: r rows, s positions of a row, m chosen positions, v tokens of a slice, k slices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megamask.diffusion.philox import Purpose, philox4x32
from megamask.errors import UsageError

MAX_ELEMENTS = 1 << 34
"""Elements position * vocabulary + token that the noise law's counter can number."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Noise of one denoising step.

    Args:
        step: denoising step, from 1.
        sequences: [r] number of each row's sequence under the seed.
        seed: of the noise.
        temperature: 0 takes the most probable token; otherwise Gumbel noise times this is added to the logits.
    """

    step: int
    sequences: tuple[int, ...]
    seed: int = 0
    temperature: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Predictions of a network at some positions.

    Args:
        tokens: [m] int64, the chosen ids.
        confidence: [m] float64, their probabilities without noise.
    """

    tokens: Tensor
    confidence: Tensor


def gumbel_noise(
    positions: Tensor,
    num_positions: int,
    vocab_size: int,
    *,
    step: int,
    seed: int,
    sequences: Tensor,
    first_token: int = 0,
    num_tokens: int | None = None,
) -> Tensor:
    """Standard Gumbel noise of some positions at one denoising step: [m, v] float64, a function of the arguments only.

    Element e = position * vocab_size + token takes word e mod 4 of counter word e div 4; the uniform is
    (word + 1/2) / 2^32, strictly between 0 and 1. Only the requested elements are computed.

    Args:
        positions: [m] int64, below num_positions.
        step: 1-based denoising step.
        sequences: [m] int64, number of each position's sequence.
        first_token, num_tokens: the slice of the vocabulary; by default all of it.

    Raises:
        UsageError: more elements than the noise law numbers.
    """
    if num_positions * vocab_size >= MAX_ELEMENTS:
        raise UsageError(f"{num_positions} positions x {vocab_size} tokens do not fit the noise law's counter")
    count = vocab_size - first_token if num_tokens is None else num_tokens
    element = positions[:, None] * vocab_size + first_token + torch.arange(count, device=positions.device)
    first = torch.div(element[:, :1], 4, rounding_mode="floor")  # each row's own words, overlapping at most by one
    words = first + torch.arange(count // 4 + 2, device=positions.device)
    low, high = sequences[:, None] & 0xFFFFFFFF, sequences[:, None] >> 32
    counter = (low, high, words, int(Purpose.DECODING) + 256 * step)
    made = torch.stack(philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)), dim=-1).flatten(1)
    uniform = (made.gather(1, element - 4 * first).to(torch.float64) + 0.5) * 2.0**-32
    return -torch.log(-torch.log(uniform))


def score_slice(
    logits: Tensor,
    positions: Tensor,
    rows: Tensor,
    *,
    num_positions: int,
    vocab_size: int,
    first_token: int,
    is_excluded: Tensor,
    draw: Draw,
) -> Tensor:
    """The best token of a slice of the vocabulary at each position, and the slice's share of the softmax.

    Args:
        logits: [m, v] of the slice.
        positions: [m] int64 position of each chosen token in its sample. num_positions: s.
        rows: [m] int64 place of each position's row among `draw.sequences`.
        vocab_size: of the full vocabulary without padding, which the noise law asks for.
        first_token: id of the slice's first column.
        is_excluded: bool [v], columns that are never chosen and take no part in the softmax.

    Returns:
        [4, m] float64: score with noise, id and logit of the best token; logsumexp of the slice.
    """
    values = logits.to(torch.float64).masked_fill(is_excluded, float("-inf"))
    scores = values
    if draw.temperature != 0:
        noise = gumbel_noise(
            positions,
            num_positions,
            vocab_size,
            step=draw.step,
            seed=draw.seed,
            sequences=torch.tensor(draw.sequences, device=rows.device)[rows],
            first_token=first_token,
            num_tokens=logits.size(1),
        )
        scores = values + draw.temperature * noise
    best = scores.argmax(dim=1, keepdim=True)  # of equals, the lowest id
    parts = (scores.gather(1, best)[:, 0], best[:, 0] + first_token, values.gather(1, best)[:, 0])
    return torch.stack([part.to(torch.float64) for part in (*parts, values.logsumexp(dim=1))])


def choose(slices: Tensor) -> Prediction:
    """Combine the answers of vocabulary slices, in the order of their ids, into the choice over the full vocabulary.

    Shapes: slices [k, 4, m]. Of equal scores the lowest id wins, as in one argmax over all.
    """
    scores, ids, logits, partial = slices.unbind(dim=1)
    winner = scores.argmax(dim=0, keepdim=True)
    total = partial.logsumexp(dim=0)
    return Prediction(
        tokens=ids.gather(0, winner)[0].to(torch.int64), confidence=(logits.gather(0, winner)[0] - total).exp()
    )
