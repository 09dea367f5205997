"""LLaDA's decoder: fill masked positions a few at a time, the most confident first.

Source: LLaDA, arXiv:2502.09992, "low-confidence remasking". The masked positions are taken in blocks from left to
right; within a block each denoising step evaluates the network once, chooses a token for every masked position, and
commits a fixed quota of those whose chosen token has the highest probability. What is committed stays. A response after
a prompt is one span of masks; infilling is any set of spans between fixed tokens.

Sampling noise follows the noise law (purpose 6: index = sequence number, draw = denoising step, from 1), so a sample is
a function of seed, prompt and network alone. Shapes: s positions of the sequence, v vocabulary, m masked positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megamask.diffusion.philox import Purpose, philox4x32
from megamask.errors import UsageError

Network = Callable[[Tensor, Tensor], Tensor]
"""(x_t [s] int64, positions [m] int64) -> logits [m, v] of the tokens at those positions."""


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How to decode.

    Args:
        num_denoising_steps: network evaluations to spend; None means one for each masked token.
        block_length: masked tokens finished before the next ones begin; None means all in one block.
        temperature: 0 takes the most probable token; otherwise Gumbel noise times this is added to the logits.
        seed: of the sampling noise. sequence: number of the sequence under that seed.
    """

    num_denoising_steps: int | None = None
    block_length: int | None = None
    temperature: float = 0.0
    seed: int = 0
    sequence: int = 0


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """A finished sequence.

    Args:
        tokens: [s] int64 without masks.
        num_denoising_steps: steps taken. nfe: network evaluations spent.
        committed: positions that each step committed.
    """

    tokens: Tensor
    num_denoising_steps: int
    nfe: int
    committed: list[list[int]]


def quotas(num_masked: int, num_steps: int) -> list[int]:
    """How many tokens each step of a block commits: as even as possible, the remainder to the first steps."""
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


def gumbel_noise(
    positions: Tensor, num_positions: int, vocab_size: int, *, step: int, seed: int, sequence: int
) -> Tensor:
    """Standard Gumbel noise of some positions at one denoising step: [m, v] float64, a function of the arguments only.

    Element e = position * vocab_size + token takes word e mod 4 of counter word e div 4; the uniform is
    (word + 1/2) / 2^32, strictly between 0 and 1. Only the positions asked for are made.

    Args:
        positions: [m] int64, below num_positions. step: 1-based denoising step.
    """
    if num_positions * vocab_size >= 1 << 34:
        raise UsageError(f"{num_positions} positions x {vocab_size} tokens do not fit the noise law's counter")
    element = positions[:, None] * vocab_size + torch.arange(vocab_size, device=positions.device)
    first = torch.div(element[:, :1], 4, rounding_mode="floor")  # each row's own words, overlapping at most by one
    counters = first + torch.arange(vocab_size // 4 + 2, device=positions.device)
    counter = (sequence & 0xFFFFFFFF, sequence >> 32, counters, int(Purpose.DECODING) + 256 * step)
    words = torch.stack(philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)), dim=-1).flatten(1)
    word = words.gather(1, element - 4 * first)
    uniform = (word.to(torch.float64) + 0.5) * 2.0**-32
    return -torch.log(-torch.log(uniform))


@torch.no_grad()
def decode(
    network: Network, tokens: Tensor, *, mask_token_id: int, forbidden: frozenset[int], options: DecodingOptions
) -> Decoded:
    """Fills every mask of a sequence; all other tokens stay as they are.

    Args:
        tokens: [s] int64, with mask_token_id where a token is wanted.
        forbidden: ids that are never chosen (padding); the mask id never is, whether listed or not.

    Raises:
        UsageError: nothing is masked, or steps, block length or temperature are out of range.
    """
    x_t = tokens.clone()
    masked = (x_t == mask_token_id).nonzero()[:, 0]
    blocks = _blocks(masked, options)
    steps = steps_of_blocks([len(block) for block in blocks], options.num_denoising_steps or len(masked))
    excluded = sorted(forbidden | {mask_token_id})
    committed: list[list[int]] = []
    for block, num_steps in zip(blocks, steps, strict=True):
        for quota in quotas(len(block), num_steps):
            open_positions = block[x_t[block] == mask_token_id]
            logits = network(x_t, open_positions).to(torch.float64)
            logits[:, [token for token in excluded if token < logits.shape[1]]] = -torch.inf
            chosen = _choose(logits, open_positions, len(x_t), options, step=len(committed) + 1)
            confidence = torch.softmax(logits, dim=1).gather(1, chosen[:, None])[:, 0]
            best = confidence.argsort(descending=True, stable=True)[:quota]  # of equals, the leftmost first
            x_t[open_positions[best]] = chosen[best]
            committed.append(sorted(open_positions[best].tolist()))
    return Decoded(tokens=x_t, num_denoising_steps=len(committed), nfe=len(committed), committed=committed)


def _choose(logits: Tensor, positions: Tensor, num_positions: int, options: DecodingOptions, *, step: int) -> Tensor:
    if options.temperature == 0:
        return logits.argmax(dim=1)
    noise = gumbel_noise(
        positions, num_positions, logits.shape[1], step=step, seed=options.seed, sequence=options.sequence
    )
    return (logits + options.temperature * noise).argmax(dim=1)


def _blocks(masked: Tensor, options: DecodingOptions) -> list[Tensor]:
    if len(masked) == 0:
        raise UsageError("there is no masked token to fill. Nothing was decoded.")
    if options.num_denoising_steps is not None and options.num_denoising_steps < 1:
        raise UsageError(f"--steps is {options.num_denoising_steps}; allowed: >= 1. Nothing was decoded.")
    length = len(masked) if options.block_length is None else options.block_length
    if length < 1:
        raise UsageError(f"--block-length is {length}; allowed: >= 1. Nothing was decoded.")
    if not 0 <= options.temperature < float("inf"):
        raise UsageError(f"--temperature is {options.temperature}; allowed: a number >= 0. Nothing was decoded.")
    return [masked[start : start + length] for start in range(0, len(masked), length)]
