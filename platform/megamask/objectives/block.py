"""Block diffusion: p(x) = product over blocks of p(x_b | x_<b), each factor a masked diffusion inside the block.

One pass trains all blocks, on the doubled input [x_t ; x_0]: a noised block sees itself and the clean blocks before it
(models/context.py, `BlockPattern`). Block size 1 is autoregressive and its likelihood exact. With a token-causal clean
half that half is an autoregressive model as well, and both losses come from the same pass (the joint loss).

A clipped schedule samples mask probabilities from a window only (BD3-LM, section 4.2), and a forced mask leaves no
block without one; with either the loss bounds nothing. The bound that evaluation computes covers the full range.

Sources: BD3-LM (arXiv:2503.09573); joint loss: Nemotron's 1.0 * autoregressive + 0.3 * diffusion.
Shapes: b samples, r = b * views rows, s tokens of a sample, 2s input positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from megamask.diffusion.block_corruption import BlockNoise, block_times, corrupt_blocks, rank_in_blocks
from megamask.diffusion.philox import Purpose, philox4x32, uniform_words
from megamask.diffusion.schedule import EPS, NoiseSchedule, noise_schedule, stratified_times, warmed_time
from megamask.errors import UsageError
from megamask.models.context import BlockPattern, Context
from megamask.models.vocabulary import Vocabulary
from megamask.objectives.base import UNGROUPED, BoundRows, Key, OnePhase, Reading, Rows, Samples, softmax_without
from megamask.objectives.documents import document_numbers, isolated, places_in_documents
from megamask.objectives.given_first import with_a_past
from megamask.objectives.probing import Probe
from megamask.objectives.shapes import ObjectiveShape, shape_of
from megamask.objectives.terms import (
    CrossEntropyTerm,
    PerEligibleToken,
    PerScoredToken,
    Term,
    cross_entropy_and_z_loss,
)

_DIFFUSION, _AUTOREGRESSIVE = 0, 1


@dataclass(frozen=True, kw_only=True)
class BlockObjective(OnePhase):
    """The NELBO of block diffusion, or its sum with the autoregressive loss of the clean half.

    Args:
        block_size: tokens of a block; the last block of a row may be shorter.
        block_time: "block" gives each block its own t by the law of docs/architecture.md, "independent" one of its own
            drawn by itself, "sequence" one t to the row.
        complementary: two rows of each sample, the second masking in each block what the first leaves visible.
        clip_low, clip_high: window of the mask probability; 0 and 1 for the full range.
        forced_mask: a block in which nothing is masked gets one mask.
        mask_ratio_warmup_steps: of `warmed_time`, each block's t; only training's.
        isolate_documents: no position sees another document of its row, and the grid restarts at each.
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
    complementary: bool = False
    clip_low: float = 0.0
    clip_high: float = 1.0
    forced_mask: bool = False
    isolate_documents: bool = False
    diffusion_weight: float | None = None
    z_loss_weight: float = 0.0
    mask_ratio_warmup_steps: int = 0

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
        per_token = PerEligibleToken(num_views=self.shape(1).num_views)
        is_bound = not (self._is_clipped or self.forced_mask or self.mask_ratio_warmup_steps)
        name = "nelbo" if is_bound else "masked_cross_entropy"
        if self.diffusion_weight is None:
            return cross_entropy_and_z_loss(name, per_token, self.z_loss_weight, is_bound=is_bound)
        nll = CrossEntropyTerm(name="nll", normalizer=PerScoredToken(part=_AUTOREGRESSIVE), part=_AUTOREGRESSIVE)
        nelbo = CrossEntropyTerm(
            name=name, normalizer=per_token, factor=self.diffusion_weight, part=_DIFFUSION, is_bound=is_bound
        )
        return (nelbo, nll, *cross_entropy_and_z_loss(name, per_token, self.z_loss_weight)[1:])

    @property
    def excluded_ids(self) -> frozenset[int]:
        """The mask token, unless its logit is included."""
        return softmax_without(self.vocabulary, self.mask_logit)

    @property
    def bound(self) -> BlockBound:
        """The exact-count bound of each block given the clean blocks before it."""
        return BlockBound(
            mask_token_id=self.vocabulary.mask_token_id,
            pattern=self._pattern,
            isolated_by=self.vocabulary if self.isolate_documents else None,
        )

    @property
    def decoder(self) -> BlockDecoder:
        """Block by block from left to right."""
        return BlockDecoder(mask_token_id=self.vocabulary.mask_token_id, pattern=self._pattern)

    def shape(self, sequence_length: int) -> ObjectiveShape:
        """One or two rows of twice the sample's length."""
        return shape_of(self._settings, sequence_length)

    def seen(self, samples: Samples, key: Key) -> Samples:
        """With documents where they are isolated."""
        return isolated(samples, self.vocabulary) if self.isolate_documents else samples

    def context(self, samples: Samples, step: int, key: Key) -> Context:
        """The doubled input's; positions and the block grid restart at each document."""
        num_views = self.shape(1).num_views
        documents = samples.documents
        return doubled_context(
            self._pattern,
            samples.tokens.repeat_interleave(num_views, dim=0),
            None if documents is None else documents.repeat_interleave(num_views, dim=0),
        )

    def rows(self, samples: Samples, step: int, key: Key) -> Rows:
        """The noised half, scored at its masks; the clean half, scored only by the joint loss, in the first view."""
        noise, num_views = self._noise(samples, step, key), self.shape(1).num_views
        clean = samples.tokens.repeat_interleave(num_views, dim=0)
        x_t = clean.masked_fill(noise.is_masked, self.vocabulary.mask_token_id)
        is_next = torch.zeros_like(noise.is_masked)
        if self.diffusion_weight is not None:  # every view has the same clean half
            is_next[::num_views] = with_a_past(samples.is_eligible, samples.documents).roll(-1, dims=1)
        part = torch.full_like(clean, _DIFFUSION)
        is_warming = step <= self.mask_ratio_warmup_steps
        weight = torch.ones_like(noise.weight) if is_warming else noise.weight
        return Rows(
            inputs=torch.cat((x_t, clean), dim=1),
            # a position of the clean half predicts the token after it
            targets=torch.cat((clean, clean.roll(-1, dims=1)), dim=1),
            is_scored=torch.cat((noise.is_masked, is_next), dim=1),
            weight=torch.cat((weight, torch.ones_like(weight)), dim=1),
            group=torch.cat((noise.noise_level, torch.full_like(noise.noise_level, UNGROUPED)), dim=1),
            context=self.context(samples, step, key),
            part=None if self.diffusion_weight is None else torch.cat((part, part + _AUTOREGRESSIVE), dim=1),
        )

    def details(self, samples: Samples, step: int, key: Key) -> list[dict[str, Any]]:
        """Of each sample: t of its row, and the positions that its first view masks in the noised half."""
        is_masked = self._noise(samples, step, key).is_masked[:: self.shape(1).num_views]
        times = [warmed_time(t, step, self.mask_ratio_warmup_steps) for t in self._times(samples, step, key)]
        return [{"t": t, "masked": row.nonzero().flatten().tolist()} for t, row in zip(times, is_masked, strict=True)]

    def unclipped(self) -> BlockObjective:
        """One view over the full range of noise, of the diffusion loss alone."""
        return replace(
            self,
            clip_low=0.0,
            clip_high=1.0,
            forced_mask=False,
            complementary=False,
            diffusion_weight=None,
            mask_ratio_warmup_steps=0,
        )

    def probe(self, samples: Samples, step: int, key: Key, *, block: Tensor) -> Probe:
        """Rows of one view in which one block of each sample is scored.

        Args:
            block: int64 [b], number of the block modulo the blocks of its row.
        """
        rows, blocks = self.rows(samples, step, key), self._blocks(samples)
        chosen = block % (blocks[:, -1] + 1)
        is_chosen = blocks == chosen[:, None]
        is_scored = rows.is_scored & torch.cat((is_chosen, torch.zeros_like(is_chosen)), dim=1)
        times = block_times(
            samples.sample_index,
            self._times(samples, step, key),
            int(blocks.max()) + 1,
            block_time=self.block_time,
            key=key,
        )
        levels = [self._schedule.mask_probability(row[number]) for row, number in zip(times, chosen, strict=True)]
        return Probe(
            rows=replace(rows, is_scored=is_scored),
            probability=torch.tensor(levels, dtype=torch.float64),
            num_eligible=(is_chosen & samples.is_eligible).sum(dim=1),
        )

    def record(self) -> dict[str, Any]:
        """Name, blocks, schedule and the mask token's logit; isolated documents where they are."""
        isolation = {"isolate_documents": True} if self.isolate_documents else {}
        return {
            "name": self.name,
            "block_size": self.block_size,
            "clean_half": self.clean_half,
            "noise_schedule": self.noise_schedule,
            "mask_logit": self.mask_logit,
        } | isolation

    @property
    def _settings(self) -> dict[str, Any]:
        return {
            **self.record(),
            "diffusion_weight": self.diffusion_weight,
            "complementary": self.complementary,
        }

    @property
    def _is_clipped(self) -> bool:
        return (self.clip_low, self.clip_high) != (0.0, 1.0)

    @property
    def _schedule(self) -> NoiseSchedule:
        schedule = noise_schedule(self.noise_schedule, self.noise_exponent)
        if not self._is_clipped:
            return schedule
        return replace(schedule, lowest=max(self.clip_low, EPS), highest=min(self.clip_high, 1 - EPS))

    @property
    def _pattern(self) -> BlockPattern:
        return BlockPattern(block_size=self.block_size, clean_half=self.clean_half)

    def _times(self, samples: Samples, step: int, key: Key) -> list[float]:
        times = stratified_times(step, samples.global_batch_size, key)
        return [times[position] for position in samples.batch_position]

    def _blocks(self, samples: Samples) -> Tensor:
        place = torch.arange(samples.tokens.size(1), device=samples.tokens.device).expand_as(samples.tokens)
        places = place if samples.documents is None else places_in_documents(samples.documents)
        return block_numbers(places, self.block_size)

    def _noise(self, samples: Samples, step: int, key: Key) -> BlockNoise:
        return corrupt_blocks(
            samples.is_eligible,
            self._blocks(samples),
            samples.sample_index,
            self._times(samples, step, key),
            schedule=self._schedule,
            block_time=self.block_time,
            largest_time=warmed_time(1.0, step, self.mask_ratio_warmup_steps),
            complementary=self.complementary,
            has_forced_mask=self.forced_mask,
            is_clipped=self._is_clipped,
            key=key,
        )


@dataclass(frozen=True, kw_only=True)
class BlockBound:
    """Sum over blocks of E_k [ n/k * E_mask [ sum over masked of CE ] ], all blocks in one pass.

    k is uniform on 1..n, n the scored tokens of the block, and the mask uniform of that size. Block size 1: exact.

    Args:
        isolated_by: the vocabulary whose end-of-document id separates documents; None where attention spans the row.
    """

    mask_token_id: int
    pattern: BlockPattern
    isolated_by: Vocabulary | None = None

    @property
    def is_exact(self) -> bool:
        """True if each block has one token, which is then always masked."""
        return self.pattern.block_size == 1

    def scored(self, tokens: Tensor, is_eligible: Tensor) -> Tensor:
        """Every eligible token."""
        return is_eligible

    def draw(
        self, tokens: Tensor, is_scored: Tensor, row_index: Tensor, *, replicate: int, member: int, draws: int, key: Key
    ) -> BoundRows:
        """Rows in which each block masks k of its n scored tokens, each of weight n / k."""
        documents = None if self.isolated_by is None else document_numbers(tokens, self.isolated_by)
        context = doubled_context(self.pattern, tokens, documents)
        assert context.positions is not None
        blocks = block_numbers(context.positions[:, : tokens.size(1)], self.pattern.block_size)
        num_blocks = int(blocks.max()) + 1
        n = torch.zeros(len(tokens), num_blocks, dtype=torch.int64, device=tokens.device)
        n = n.scatter_add(1, blocks, is_scored.to(torch.int64))
        k = _counts(row_index, n.clamp(min=1), replicate=replicate, member=member, draws=draws, key=key)
        words = uniform_words(
            row_index, tokens.size(1), purpose=Purpose.VALIDATION_MASK, key=key, draw=replicate * draws + member
        )
        is_masked = is_scored & (rank_in_blocks(blocks, words, is_scored) < k.gather(1, blocks))
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
    """Positions 0 to s - 1 twice, or from each document's first token on. Shapes: tokens, documents [r, s]."""
    if documents is None:
        place = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
        return Context(pattern=pattern, positions=torch.cat((place, place), dim=1))
    place = places_in_documents(documents)
    return Context(
        pattern=pattern,
        positions=torch.cat((place, place), dim=1),
        documents=torch.cat((documents, documents), dim=1),
    )


def block_numbers(places: Tensor, block_size: int) -> Tensor:
    """Number of each token's block in its row, counted across documents: int64 [b, s], ascending.

    Args:
        places: int64 [b, s], place of each token in its document.
    """
    return (places % block_size == 0).to(torch.int64).cumsum(dim=1) - 1
