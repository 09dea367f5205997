"""Block diffusion: p(x) = product over blocks of p(x_b | x_<b), each factor a masked diffusion inside the block.

One pass trains all blocks, on the doubled input [x_t ; x_0]: a noised block sees itself and the clean blocks before it
(models/context.py, `BlockPattern`). Block size 1 is autoregressive and its likelihood exact. With a token-causal clean
half that half is an autoregressive model as well, and both losses come from the same pass (the joint loss).

Sources: BD3-LM (arXiv:2503.09573); joint loss: Nemotron's 1.0 * autoregressive + 0.3 * diffusion.
Shapes: b samples, one row each, s tokens of a sample, 2s input positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megamask.diffusion.corruption import NUM_NOISE_LEVELS
from megamask.diffusion.philox import Purpose, philox4x32, uniform_words
from megamask.diffusion.schedule import noise_schedule, stratified_times, threshold
from megamask.errors import UsageError
from megamask.models.context import BlockPattern, Context
from megamask.models.vocabulary import Vocabulary
from megamask.objectives.autoregressive import all_but_first
from megamask.objectives.base import UNGROUPED, BoundRows, Key, Reading, Rows, Samples, softmax_without
from megamask.objectives.shapes import ObjectiveShape, shape_of
from megamask.objectives.terms import (
    CrossEntropyTerm,
    PerEligibleToken,
    PerScoredToken,
    Term,
    cross_entropy_and_z_loss,
)

_RESOLUTION = 1 << 32
_GOLDEN = 0.6180339887498949
_DIFFUSION, _AUTOREGRESSIVE = 0, 1


@dataclass(frozen=True, kw_only=True)
class BlockObjective:
    """The NELBO of block diffusion, or its sum with the autoregressive loss of the clean half.

    Args:
        block_size: tokens of a block; the last block of a row may be shorter.
        block_time: "block" gives each block its own t, "sequence" one t to the row.
        clean_half: "block_causal" or "token_causal".
        diffusion_weight: of the NELBO in the joint loss, whose autoregressive part has weight 1; None for the NELBO
            alone.

    Raises:
        UsageError: for a choice that does not exist, or a joint loss whose clean half is not token-causal.
    """

    vocabulary: Vocabulary
    block_size: int
    clean_half: Literal["block_causal", "token_causal"]
    mask_logit: str
    noise_schedule: str = "linear"
    noise_exponent: float = 1.0
    block_time: str = "block"
    diffusion_weight: float | None = None
    z_loss_weight: float = 0.0

    def __post_init__(self) -> None:
        noise_schedule(self.noise_schedule)
        softmax_without(self.vocabulary, self.mask_logit)
        if type(self.block_size) is not int or self.block_size < 1:
            raise UsageError(f"objective.block_size is {self.block_size!r}; allowed: an integer >= 1.")
        if self.clean_half not in ("block_causal", "token_causal"):
            raise UsageError(f"objective.clean_half is {self.clean_half!r}; allowed: block_causal, token_causal.")
        if self.diffusion_weight is not None and self.clean_half != "token_causal":
            raise UsageError("objective.diffusion_weight needs objective.clean_half=token_causal. Nothing was started.")

    @property
    def name(self) -> str:
        """As in `objective.name`."""
        return "block"

    @property
    def num_parts(self) -> int:
        """Diffusion, and the autoregressive part of the joint loss."""
        return 1 if self.diffusion_weight is None else 2

    @property
    def terms(self) -> tuple[Term, ...]:
        """The NELBO per eligible token; in the joint loss beside the exact likelihood of the clean half."""
        per_token = PerEligibleToken(num_views=1)
        if self.diffusion_weight is None:
            return cross_entropy_and_z_loss("nelbo", per_token, self.z_loss_weight)
        nll = CrossEntropyTerm(name="nll", normalizer=PerScoredToken(part=_AUTOREGRESSIVE), part=_AUTOREGRESSIVE)
        nelbo = CrossEntropyTerm(
            name="nelbo", normalizer=per_token, factor=self.diffusion_weight, part=_DIFFUSION, is_bound=True
        )
        return (nelbo, nll, *cross_entropy_and_z_loss("nelbo", per_token, self.z_loss_weight)[1:])

    @property
    def excluded_ids(self) -> frozenset[int]:
        """The mask token, unless its logit is included."""
        return softmax_without(self.vocabulary, self.mask_logit)

    @property
    def bound(self) -> BlockBound:
        """The exact-count bound of each block given the clean blocks before it."""
        return BlockBound(mask_token_id=self.vocabulary.mask_token_id, pattern=self._pattern)

    @property
    def decoder(self) -> BlockDecoder:
        """Block by block from left to right."""
        return BlockDecoder(mask_token_id=self.vocabulary.mask_token_id, pattern=self._pattern)

    def shape(self, sequence_length: int) -> ObjectiveShape:
        """One row of twice the sample's length."""
        return shape_of(self._settings, sequence_length)

    def context(self, samples: Samples, step: int, key: Key) -> Context:
        """The doubled input's; positions and the block grid restart at each document."""
        return doubled_context(self._pattern, samples.tokens, samples.documents)

    def rows(self, samples: Samples, step: int, key: Key) -> Rows:
        """The noised half, scored at its masks; the clean half, scored only by the joint loss."""
        context = self.context(samples, step, key)
        is_masked, weight, level = self._noise(samples, step, key, context)
        x_t = samples.tokens.masked_fill(is_masked, self.vocabulary.mask_token_id)
        is_next = all_but_first(samples.is_eligible).roll(-1, dims=1)
        if self.diffusion_weight is None:
            is_next = torch.zeros_like(is_next)
        clean_targets = samples.tokens.roll(-1, dims=1)  # a position of the clean half predicts the token after it
        part = torch.full_like(samples.tokens, _DIFFUSION)
        return Rows(
            inputs=torch.cat((x_t, samples.tokens), dim=1),
            targets=torch.cat((samples.tokens, clean_targets), dim=1),
            is_scored=torch.cat((is_masked, is_next), dim=1),
            weight=torch.cat((weight, torch.ones_like(weight)), dim=1),
            group=torch.cat((level, torch.full_like(level, UNGROUPED)), dim=1),
            context=context,
            part=None if self.diffusion_weight is None else torch.cat((part, part + _AUTOREGRESSIVE), dim=1),
        )

    def details(self, samples: Samples, step: int, key: Key) -> list[dict[str, Any]]:
        """Of each sample: t of its first block, and the positions masked in its noised half."""
        is_masked, _, _ = self._noise(samples, step, key, self.context(samples, step, key))
        times = self._times(samples, step, key)
        return [{"t": t, "masked": row.nonzero().flatten().tolist()} for t, row in zip(times, is_masked, strict=True)]

    def record(self) -> dict[str, Any]:
        """Name, blocks, schedule and the mask token's logit."""
        return {
            "name": self.name,
            "block_size": self.block_size,
            "clean_half": self.clean_half,
            "noise_schedule": self.noise_schedule,
            "mask_logit": self.mask_logit,
        }

    @property
    def _settings(self) -> dict[str, Any]:
        return {**self.record(), "diffusion_weight": self.diffusion_weight}

    @property
    def _pattern(self) -> BlockPattern:
        return BlockPattern(block_size=self.block_size, clean_half=self.clean_half)

    def _times(self, samples: Samples, step: int, key: Key) -> list[float]:
        times = stratified_times(step, samples.global_batch_size, key)
        return [times[position] for position in samples.batch_position]

    def _noise(self, samples: Samples, step: int, key: Key, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """(is_masked bool, weight float32, noise level int64), all [b, s].

        Block k of a row has t = frac(t_j + frac(k * golden ratio)): stratified over the batch for each k, spread within
        a row, for any number of blocks.
        """
        schedule = noise_schedule(self.noise_schedule, self.noise_exponent)
        blocks = block_numbers(context, self.block_size, samples.tokens.size(1)).expand_as(samples.tokens)
        num_blocks = int(blocks.max()) + 1
        shifts = [k * _GOLDEN % 1.0 if self.block_time == "block" else 0.0 for k in range(num_blocks)]
        times = [[(t + shift) % 1.0 for shift in shifts] for t in self._times(samples, step, key)]
        limits = [[max(threshold(schedule.mask_probability(t)), 1) for t in row] for row in times]
        weights = [
            [schedule.derivative(t) / (limit / _RESOLUTION) for t, limit in zip(*pair, strict=True)]
            for pair in zip(times, limits, strict=True)
        ]
        limit = torch.tensor(limits, device=blocks.device).gather(1, blocks)
        words = uniform_words(samples.sample_index, blocks.size(1), purpose=Purpose.MASK, key=key)
        weight = torch.tensor(weights, dtype=torch.float64).to(torch.float32).to(blocks.device).gather(1, blocks)
        return samples.is_eligible & (words < limit), weight, limit * NUM_NOISE_LEVELS // _RESOLUTION


@dataclass(frozen=True, kw_only=True)
class BlockBound:
    """Sum over blocks of E_k [ n/k * E_mask [ sum over masked of CE ] ], all blocks in one pass.

    k is uniform on 1..n, n the scored tokens of the block, and the mask uniform of that size. Block size 1: exact.
    """

    mask_token_id: int
    pattern: BlockPattern

    @property
    def is_exact(self) -> bool:
        """True if each block has one token, which is then always masked."""
        return self.pattern.block_size == 1

    def scored(self, is_eligible: Tensor) -> Tensor:
        """Every eligible token."""
        return is_eligible

    def draw(
        self, tokens: Tensor, is_scored: Tensor, row_index: Tensor, *, replicate: int, member: int, draws: int, key: Key
    ) -> BoundRows:
        """Rows in which each block masks k of its n scored tokens, each of weight n / k."""
        context = doubled_context(self.pattern, tokens, None)
        blocks = block_numbers(context, self.pattern.block_size, tokens.size(1)).expand_as(tokens)
        num_blocks = int(blocks.max()) + 1
        n = torch.zeros(len(tokens), num_blocks, dtype=torch.int64, device=tokens.device)
        n = n.scatter_add(1, blocks, is_scored.to(torch.int64))
        k = _counts(row_index, n.clamp(min=1), replicate=replicate, member=member, draws=draws, key=key)
        words = uniform_words(
            row_index, tokens.size(1), purpose=Purpose.VALIDATION_MASK, key=key, draw=replicate * draws + member
        )
        # the rank of each scored position inside its block: sort by (block, word, position)
        order = (blocks * (2 * _RESOLUTION) + torch.where(is_scored, words, _RESOLUTION)).argsort(dim=1, stable=True)
        place = torch.arange(tokens.size(1), device=tokens.device)
        rank = torch.empty_like(order).scatter_(1, order, place.expand_as(order))
        first = torch.searchsorted(blocks.contiguous(), blocks.contiguous())  # each block's first position
        is_masked = is_scored & (rank - first < k.gather(1, blocks))
        weight = (n.to(torch.float64) / k).gather(1, blocks)
        return BoundRows(
            rows=Rows(
                inputs=torch.cat((tokens.masked_fill(is_masked, self.mask_token_id), tokens), dim=1),
                targets=torch.cat((tokens, tokens), dim=1),
                is_scored=torch.cat((is_masked, torch.zeros_like(is_masked)), dim=1),
                weight=torch.cat((weight, weight), dim=1),
                group=torch.full((), UNGROUPED, device=tokens.device).expand(len(tokens), 2 * tokens.size(1)),
                context=context,
            )
        )


def _counts(row_index: Tensor, n: Tensor, *, replicate: int, member: int, draws: int, key: Key) -> Tensor:
    """k of each block [b, blocks]: purpose 13, index = validation row, word = block; members are spread evenly."""
    block = torch.arange(n.size(1), device=n.device)[None]
    low, high = (row_index & 0xFFFFFFFF)[:, None], (row_index >> 32)[:, None]
    word = philox4x32((low, high, block, int(Purpose.VALIDATION_BLOCK_COUNT) + 256 * replicate), key)[0]
    return ((word * n >> 32) + member * n // draws) % n + 1


@dataclass(frozen=True, kw_only=True)
class BlockDecoder:
    """Fills one block of the grid after another; inside a block the most confident positions first."""

    mask_token_id: int
    pattern: BlockPattern
    opening: tuple[int, ...] = ()

    def blocks(self, tokens: Tensor, wanted: Tensor, block_length: int | None) -> list[Tensor]:
        """The wanted positions of each block of the grid."""
        size = self.pattern.block_size
        if block_length not in (None, size):
            raise UsageError(
                f"--block-length is {block_length}, but the model was trained with objective.block_size = {size}; "
                f"allowed: {size}, or nothing. Nothing was decoded."
            )
        later = (int(wanted[0]) // size + 1) * size
        is_fixed = tokens != self.mask_token_id
        is_fixed[wanted] = False
        if bool(is_fixed[later:].any()):
            raise UsageError(
                "a block-diffusion model does not see the blocks after a gap. Nothing was decoded.",
                hint="give --prompt in place of --infill",
            )
        of_block = wanted // size
        return [wanted[of_block == number] for number in sorted(set(of_block.tolist()))]

    def reading(self, tokens: Tensor, is_open: Tensor) -> Reading:
        """The doubled input; later blocks of the clean half hold masks that no open position sees."""
        return Reading(
            inputs=torch.cat((tokens, tokens), dim=1),
            context=doubled_context(self.pattern, tokens, None),
            is_read=torch.cat((is_open, torch.zeros_like(is_open)), dim=1),
            num_positions=tokens.size(1),
        )


def doubled_context(pattern: BlockPattern, tokens: Tensor, documents: Tensor | None) -> Context:
    """Positions 0 to s - 1 twice, or from each document's first token on. Shapes: tokens, documents [b, s]."""
    place = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
    if documents is None:
        return Context(pattern=pattern, positions=torch.cat((place, place), dim=1))
    is_start = torch.ones_like(documents, dtype=torch.bool)
    is_start[:, 1:] = documents[:, 1:] != documents[:, :-1]
    place = place - torch.where(is_start, place, 0).cummax(dim=1).values
    return Context(
        pattern=pattern,
        positions=torch.cat((place, place), dim=1),
        documents=torch.cat((documents, documents), dim=1),
    )


def block_numbers(context: Context, block_size: int, num_positions: int) -> Tensor:
    """Number of each token's block in its row, counted across documents: int64 [b, s], ascending."""
    assert context.positions is not None
    is_start = context.positions[:, :num_positions] % block_size == 0
    return is_start.to(torch.int64).cumsum(dim=1) - 1
