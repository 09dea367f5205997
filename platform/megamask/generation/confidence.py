"""LLaDA's decoder: fill masked positions a few at a time, the most confident first.

Source: LLaDA, arXiv:2502.09992, "low-confidence remasking". The masked positions of a row are taken in blocks from left
to right; within a block each denoising step evaluates the network once, chooses a token for every masked position, and
commits a fixed quota of those whose chosen token has the highest probability. What is committed stays. A response after
a prompt is one span of masks; infilling is any set of spans between fixed tokens.

In random order, with temperature 1 and a step for each token, the same loop is ancestral sampling: the reverse of
masking unmasks in a uniformly random order, each token drawn from the network's distribution (MDLM, arXiv:2406.07524).

This is the policy; a Predictor hides the network: `megamask sample` decodes with the reference network, previews
during training with the engine. Shapes: r rows, s positions of a row, m open positions of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megamask.diffusion.philox import Purpose, run_key, uniform_words
from megamask.diffusion.sampling import Draw
from megamask.errors import UsageError
from megamask.generation.predictor import Predictor
from megamask.objectives.base import Decoder

ORDERS = ("confidence", "random")
_STEPS_OF_CONFIDENCE = 2**14  # confidences are distinguished in steps of one part in 16384


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """Settings of the decoder.

    Args:
        num_denoising_steps: network evaluations to spend on a row; None means one for each masked token.
        block_length: masked tokens finished before the next ones begin; None means all in one block.
        temperature: 0 takes the most probable token; otherwise Gumbel noise times this is added to the logits.
        seed: of the sampling noise.
        order: what is committed first: the most confident positions, or random ones.
    """

    num_denoising_steps: int | None = None
    block_length: int | None = None
    temperature: float = 0.0
    seed: int = 0
    order: str = "confidence"


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """A finished row.

    Args:
        tokens: [s] int64 without masks where some were to be filled.
        num_denoising_steps: steps taken. nfe: network evaluations spent.
        committed: positions that each step committed.
    """

    tokens: Tensor
    num_denoising_steps: int
    nfe: int
    committed: list[list[int]]


def quotas(num_masked: int, num_steps: int) -> list[int]:
    """Numbers of tokens that the steps of a block commit: as even as possible, the remainder to the first steps."""
    least, remainder = divmod(num_masked, num_steps)
    return [least + (step < remainder) for step in range(num_steps)]


def steps_of_blocks(block_sizes: list[int], num_steps: int) -> list[int]:
    """Deals denoising steps to blocks: as even as possible, the first ones first, never more steps than tokens.

    Raises:
        UsageError: fewer steps than blocks, or more than tokens.
    """
    if not len(block_sizes) <= num_steps <= sum(block_sizes):
        raise UsageError(
            f"{num_steps} denoising steps for {sum(block_sizes)} masked tokens in {len(block_sizes)} block(s); "
            f"allowed: {len(block_sizes)} to {sum(block_sizes)}. Nothing was decoded.",
            hint="change --steps, or make --block-length larger",
        )
    steps = [0] * len(block_sizes)
    left = num_steps
    while left:
        for block, size in enumerate(block_sizes):
            if left and steps[block] < size:
                steps[block] += 1
                left -= 1
    return steps


@dataclass(frozen=True, kw_only=True)
class _Step:
    """One denoising step of a row: the block it works on, and how many of its positions it commits."""

    block: Tensor
    quota: int


@torch.no_grad()
def decode(
    predict: Predictor,
    decoder: Decoder,
    tokens: Tensor,
    *,
    is_wanted: Tensor,
    options: DecodingOptions,
    sequences: Sequence[int] = (0,),
) -> list[Decoded]:
    """Fill masks of some rows; all other tokens stay as they are. Rows take their steps side by side.

    Args:
        decoder: the objective's: which positions are filled together, and where they are read.
        tokens: [r, s] int64, with mask tokens where is_wanted.
        is_wanted: bool [r, s], the positions to fill; other masks stay, and the network sees them.
        sequences: [r] numbers of the rows under the seed; a row's noise depends on its own number only.

    Returns: a row's result for each row, independent of the other rows up to rounding in the network.
    Raises:
        UsageError: a row has nothing to fill, or steps, block length or temperature are out of range.
    """
    x_t, is_masked = tokens.clone(), is_wanted.clone()
    plans = _plans(decoder, tokens, is_wanted, options)
    committed: list[list[list[int]]] = [[] for _ in plans]
    ranks = _random_order(tokens, sequences, options)
    for number in range(max(map(len, plans))):
        is_open = torch.zeros_like(is_masked)
        for row, plan in enumerate(plans):
            if number < len(plan):
                is_open[row, plan[number].block] = is_masked[row, plan[number].block]
        draw = Draw(step=number + 1, sequences=tuple(sequences), seed=options.seed, temperature=options.temperature)
        prediction = predict(decoder.reading(x_t, is_open), draw)
        first = 0
        for row, plan in enumerate(plans):
            positions = is_open[row].nonzero()[:, 0]
            part = slice(first, first + len(positions))
            first = part.stop
            if number < len(plan):
                quota = plan[number].quota
                if ranks is None:
                    best = _most_confident(prediction.confidence[part], quota)
                else:
                    best = ranks[row, positions].argsort(stable=True)[:quota]
                x_t[row, positions[best]] = prediction.tokens[part][best]
                is_masked[row, positions[best]] = False
                committed[row].append(sorted(positions[best].tolist()))
    return [
        Decoded(tokens=x_t[row], num_denoising_steps=len(steps), nfe=len(steps), committed=steps)
        for row, steps in enumerate(committed)
    ]


def check_decoding(decoder: Decoder, tokens: Tensor, is_wanted: Tensor, options: DecodingOptions) -> None:
    """Refuse what `decode` would refuse, without a network; arguments and errors as there."""
    _plans(decoder, tokens, is_wanted, options)


def _plans(decoder: Decoder, tokens: Tensor, is_wanted: Tensor, options: DecodingOptions) -> list[list[_Step]]:
    return [_plan(row, wanted.nonzero()[:, 0], decoder, options) for row, wanted in zip(tokens, is_wanted, strict=True)]


def _most_confident(confidence: Tensor, quota: int) -> Tensor:
    """Places of the highest confidences; of those that rounding cannot distinguish, the leftmost.

    In a row of masks alone every position has the same probabilities, up to the order of sums in the network: without
    the rounding here, the layout would choose among them.
    """
    return (confidence.log() * _STEPS_OF_CONFIDENCE).round().argsort(descending=True, stable=True)[:quota]


def _random_order(tokens: Tensor, sequences: Sequence[int], options: DecodingOptions) -> Tensor | None:
    """Word of each position, int64 [r, s]: the smallest is committed first. None for the order by confidence."""
    if options.order != "random":
        return None
    index = torch.tensor(tuple(sequences), device=tokens.device)
    return uniform_words(index, tokens.size(1), purpose=Purpose.DECODING_ORDER, key=run_key(options.seed))


def _plan(tokens: Tensor, masked: Tensor, decoder: Decoder, options: DecodingOptions) -> list[_Step]:
    _check(masked, options)
    blocks = decoder.blocks(tokens, masked, options.block_length)
    steps = steps_of_blocks([len(block) for block in blocks], options.num_denoising_steps or len(masked))
    return [
        _Step(block=block, quota=quota)
        for block, num_steps in zip(blocks, steps, strict=True)
        for quota in quotas(len(block), num_steps)
    ]


def _check(masked: Tensor, options: DecodingOptions) -> None:
    if len(masked) == 0:
        raise UsageError("there is no masked token to fill. Nothing was decoded.")
    if options.num_denoising_steps is not None and options.num_denoising_steps < 1:
        raise UsageError(f"--steps is {options.num_denoising_steps}; allowed: >= 1. Nothing was decoded.")
    if options.block_length is not None and options.block_length < 1:
        raise UsageError(f"--block-length is {options.block_length}; allowed: >= 1. Nothing was decoded.")
    if options.order not in ORDERS:
        raise UsageError(f"--order is {options.order!r}; allowed: {', '.join(ORDERS)}. Nothing was decoded.")
    if not 0 <= options.temperature < float("inf"):
        raise UsageError(f"--temperature is {options.temperature}; allowed: a number >= 0. Nothing was decoded.")
