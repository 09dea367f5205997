"""A diffusion objective whose logits at a position predict the token after it, as an autoregressive start leaves them.

logits'_i = logits_(i-1) (DiffuLLaMA, arXiv:2410.17891, section 3.2; Dream, arXiv:2508.15487): the meaning of a causal
model's head is kept while its attention becomes bidirectional. Nothing predicts the first token of a row, or of a
document that sees no other, so it is given: never corrupted, never scored, as in the autoregressive objective. The
normaliser of a term keeps counting it.

Shapes: b samples, r rows, s tokens of a sample, i positions of a row (s, or 2s for a doubled input).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megamask.errors import UsageError
from megamask.models.vocabulary import NO_ID
from megamask.objectives.base import Bound, BoundRows, Decoder, Key, Objective, Reading, Rows, Samples
from megamask.objectives.given_first import given_first, with_a_past
from megamask.objectives.probing import Probe, Probed
from megamask.objectives.wrapped import Wrapped

SHIFT_KEY = "target_shift"
"""Key of an objective's record: true, or the last step that the shift is kept at."""


@dataclass(frozen=True, kw_only=True)
class Shifted(Wrapped):
    """An objective with its targets shifted by one position.

    Args:
        inner: masked or block diffusion, or either of them eased (warm_start.py).
        until_step: last step that is trained with the shift; None for every step.
    """

    until_step: int | None = None

    def is_active(self, step: int) -> bool:
        """True if a step (from 1) is trained with the shift."""
        return self.until_step is None or step <= self.until_step

    @property
    def bound(self) -> ShiftedBound:
        """The inner bound given first tokens."""
        return ShiftedBound(inner=given_first(self.inner.bound, self.inner))

    @property
    def decoder(self) -> ShiftedDecoder:
        """The inner decoder, read one position earlier."""
        return ShiftedDecoder(inner=self.inner.decoder, eod_token_id=self.vocabulary.eod_token_id)

    def rows(self, samples: Samples, step: int, key: Key) -> Rows:
        """The inner rows, each target one position earlier."""
        if not self.is_active(step):
            return self.inner.rows(samples, step, key)
        return earlier(self.inner.rows(_first_given(samples), step, key), samples.tokens.size(1))

    def details(self, samples: Samples, step: int, key: Key) -> list[dict[str, Any]]:
        """As of the inner objective; a first token is never among the masked ones."""
        return self.inner.details(_first_given(samples) if self.is_active(step) else samples, step, key)

    def record(self) -> dict[str, Any]:
        """The inner record and the shift."""
        return {**self.inner.record(), SHIFT_KEY: True if self.until_step is None else self.until_step}


@dataclass(frozen=True, kw_only=True)
class ShiftedBound:
    """A bound whose targets are shifted.

    Args:
        inner: gives the first token of each row, and scores none that nothing is before.
    """

    inner: Bound

    @property
    def is_exact(self) -> bool:
        """As of the inner bound."""
        return self.inner.is_exact

    def scored(self, tokens: Tensor, is_eligible: Tensor) -> Tensor:
        """The tokens that the inner bound scores."""
        return self.inner.scored(tokens, is_eligible)

    def draw(
        self, tokens: Tensor, is_scored: Tensor, row_index: Tensor, *, replicate: int, member: int, draws: int, key: Key
    ) -> BoundRows:
        """The inner draw, each target one position earlier."""
        drawn = self.inner.draw(tokens, is_scored, row_index, replicate=replicate, member=member, draws=draws, key=key)
        return replace(drawn, rows=earlier(drawn.rows, tokens.size(1)))


@dataclass(frozen=True, kw_only=True)
class ShiftedDecoder:
    """A decoder that reads each open position one position earlier.

    Args:
        eod_token_id: what an empty prompt is replaced by, because another document begins after it.
    """

    inner: Decoder
    eod_token_id: int

    @property
    def opening(self) -> tuple[int, ...]:
        """The end of a document, where the model has one."""
        return () if self.eod_token_id == NO_ID else (self.eod_token_id,)

    def blocks(self, tokens: Tensor, wanted: Tensor, block_length: int | None) -> list[Tensor]:
        """As of the inner decoder; the first position of a row cannot be filled."""
        if int(wanted[0]) == 0:
            raise UsageError(
                "a model with a target shift reads each token at the position before it, and the first one has none. "
                "Nothing was decoded.",
                hint="begin the text with at least one known token",
            )
        return self.inner.blocks(tokens, wanted, block_length)

    def reading(self, tokens: Tensor, is_open: Tensor) -> Reading:
        """The inner forward pass, read one position earlier."""
        reading, size = self.inner.reading(tokens, is_open), tokens.size(1)
        return replace(reading, is_read=_rolled(reading.is_read, size), shift=reading.shift + 1)


@dataclass(frozen=True, kw_only=True)
class ShiftedProbe:
    """Measurements of one part of the loss at a time, with shifted targets."""

    inner: Probed

    def unclipped(self) -> ShiftedProbe:
        """Over the full range of noise."""
        return ShiftedProbe(inner=self.inner.unclipped())

    def seen(self, samples: Samples, key: Key) -> Samples:
        """The samples as the inner objective sees them."""
        return self.inner.seen(samples, key)

    def probe(self, samples: Samples, step: int, key: Key, *, block: Tensor) -> Probe:
        """The inner part, each target one position earlier."""
        probe = self.inner.probe(_first_given(samples), step, key, block=block)
        return replace(probe, rows=earlier(probe.rows, samples.tokens.size(1)))


def with_shift(objective: Objective, shift: bool | int) -> Objective:
    """An objective under a shift setting: False for none, True for always, a number for the steps up to it.

    Raises:
        UsageError: the setting is none of these, or the objective has a shift of its own.
    """
    if shift is False:
        return objective
    if shift is not True and (type(shift) is not int or shift < 1):
        raise UsageError(f"{SHIFT_KEY} is {shift!r}; allowed: true, false, or a step from 1 on. Nothing was started.")
    if objective.name == "autoregressive":
        raise UsageError(
            f"{SHIFT_KEY} is set for an autoregressive objective, which always shifts. Nothing was started."
        )
    return Shifted(inner=objective, until_step=None if shift is True else shift)


def earlier(rows: Rows, size: int) -> Rows:
    """The rows with everything about a target moved one position to the left.

    Args:
        size: s; a doubled input is shifted in its first half, where the noised tokens are.
    """
    return replace(
        rows,
        targets=_rolled(rows.targets, size),
        is_scored=_rolled(rows.is_scored, size),
        weight=_rolled(rows.weight, size),
        group=_rolled(rows.group, size),
        part=None if rows.part is None else _rolled(rows.part, size),
    )


def _rolled(values: Tensor, size: int) -> Tensor:
    """Columns 1 to size - 1 one to the left; column 0, which is never scored or wanted, goes to the end of them."""
    return torch.cat((values[:, :size].roll(-1, dims=1), values[:, size:]), dim=1)


def _first_given(samples: Samples) -> Samples:
    return replace(samples, is_eligible=with_a_past(samples.is_eligible, samples.documents))
