"""Diffusion with masks and random tokens at once, so that a decoder may learn to correct what it wrote.

`log_snr`: interpolating noise whose share of random tokens follows the log-SNR (GIDD; diffusion/interpolation.py); all
eligible positions are scored and the loss is the NELBO. `edit`: masked diffusion whose visible tokens are replaced by
random ones with a fixed probability; masked tokens are predicted (mask to token) and replaced ones put right (token to
token), each a plain cross entropy, and the sum bounds nothing.

Sources: GIDD, arXiv:2503.04482; its mixture by log-SNR: arXiv:2512.10858; mask to token
plus token to token: LLaDA2.1's report.

Shapes: b samples, one row each, s tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megamask.diffusion.corruption import corrupt
from megamask.diffusion.interpolation import Mixture
from megamask.diffusion.philox import Purpose, uniform_words
from megamask.diffusion.schedule import threshold
from megamask.errors import UsageError
from megamask.objectives.base import UNGROUPED, Bound, Key, Rows, Samples
from megamask.objectives.interpolating import TokenNoise, token_ids
from megamask.objectives.masked import MaskedBound, MaskedDecoder
from megamask.objectives.terms import CrossEntropyTerm, PerEligibleToken, Term, cross_entropy_and_z_loss

CORRUPTIONS = ("log_snr", "edit")
_MASKED, _EDITED = 0, 1


@dataclass(frozen=True, kw_only=True)
class MixedObjective(TokenNoise):
    """Masks and random tokens; further settings and errors as of `TokenNoise`.

    Args:
        corruption: "log_snr" or "edit".
        uniform_slope, uniform_shift: a and b of the share of random tokens, of log_snr.
        edit_fraction, edit_weight: chance that a visible token is replaced, and the weight of its cross entropy, of
            edit.
    """

    corruption: str
    uniform_slope: float = 1.0
    uniform_shift: float = 0.0
    edit_fraction: float = 0.1
    edit_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.corruption not in CORRUPTIONS:
            raise UsageError(
                f"objective.corruption is {self.corruption!r}; allowed: {', '.join(CORRUPTIONS)}. Nothing was started."
            )

    @property
    def name(self) -> str:
        """As in `objective.name`."""
        return "mixed"

    @property
    def num_parts(self) -> int:
        """One, or masked and edited positions."""
        return 2 if self._is_edit else 1

    @property
    def terms(self) -> tuple[Term, ...]:
        """The NELBO; or the masked and the edited cross entropy, both per eligible token."""
        per_token = PerEligibleToken(num_views=1)
        if not self._is_edit:
            return cross_entropy_and_z_loss("nelbo", per_token, self.z_loss_weight)
        masked = CrossEntropyTerm(name="masked_cross_entropy", normalizer=per_token, part=_MASKED)
        edited = CrossEntropyTerm(
            name="edited_cross_entropy", normalizer=per_token, factor=self.edit_weight, part=_EDITED
        )
        return (masked, edited, *cross_entropy_and_z_loss("nelbo", per_token, self.z_loss_weight)[1:])

    @property
    def bound(self) -> Bound:
        """The divergence over the full range of p; for edit that of masked diffusion."""
        if self._is_edit:
            return MaskedBound(
                mask_token_id=self.vocabulary.mask_token_id,
                isolated_by=self.vocabulary if self.isolate_documents else None,
            )
        return self.divergence_bound

    @property
    def decoder(self) -> MaskedDecoder:
        """The decoder of masked diffusion: what is not decoded yet is masked, as it is at much noise."""
        return MaskedDecoder()

    def rows(self, samples: Samples, step: int, key: Key) -> Rows:
        """Noised rows: all eligible positions scored by a divergence, or masked and edited ones by cross entropy."""
        if self._is_edit:
            return self._edit_rows(samples, step, key)
        return self.divergence_rows(samples, step, key)

    def details(self, samples: Samples, step: int, key: Key) -> list[dict[str, Any]]:
        """Of each sample: t, the positions that noise wrote with a noise level, and those with a random token."""
        rows = self.rows(samples, step, key)
        is_leveled = rows.is_scored & (rows.group != UNGROUPED)
        is_random = (rows.inputs != samples.tokens) & (rows.inputs != self.vocabulary.mask_token_id)
        return [
            {
                "t": t,
                "masked": leveled.nonzero().flatten().tolist(),
                "random": random.nonzero().flatten().tolist(),
            }
            for t, leveled, random in zip(self.times(samples, step, key), is_leveled, is_random, strict=True)
        ]

    def record(self) -> dict[str, Any]:
        """Name, corruption with its mixture, schedule and the mask token's logit; isolated documents where they are."""
        isolation = {"isolate_documents": True} if self.isolate_documents else {}
        mixture = (
            {"edit_fraction": self.edit_fraction}
            if self._is_edit
            else {"uniform_slope": self.uniform_slope, "uniform_shift": self.uniform_shift}
        )
        return {
            "name": self.name,
            "corruption": self.corruption,
            "noise_schedule": self.noise_schedule,
            "mask_logit": self.mask_logit,
        } | (mixture | isolation)

    @property
    def _is_edit(self) -> bool:
        return self.corruption == "edit"

    @property
    def mixture(self) -> Mixture:
        """Masks, and random tokens at a share that follows the log-SNR."""
        return Mixture(slope=self.uniform_slope, shift=self.uniform_shift)

    def _edit_rows(self, samples: Samples, step: int, key: Key) -> Rows:
        """Masks by purpose 1 with weight p'/p^; a visible token is replaced where word 2 pos of purpose 3 is below
        floor(edit_fraction * 2^32), by the token at place (word 2 pos + 1) * K div 2^32.
        """
        tokens = samples.tokens
        noised = corrupt(
            tokens,
            samples.is_eligible,
            samples.sample_index,
            self.times(samples, step, key),
            schedule=self.schedule,
            complementary=False,
            mask_token_id=self.vocabulary.mask_token_id,
            key=key,
        )
        words = uniform_words(samples.sample_index, 2 * tokens.size(1), purpose=Purpose.RANDOM_TOKEN, key=key)
        ids = token_ids(self.vocabulary, tokens.device)
        is_edited = samples.is_eligible & ~noised.is_masked & (words[:, ::2] < threshold(self.edit_fraction))
        random_token = ids[words[:, 1::2] * len(ids) >> 32]
        one = torch.ones((), device=tokens.device)
        return Rows(
            inputs=torch.where(is_edited, random_token, noised.x_t),
            targets=tokens,
            is_scored=noised.is_masked | is_edited,
            weight=torch.where(is_edited, one, noised.weight[:, None]),
            group=torch.where(is_edited, UNGROUPED, noised.noise_level[:, None]).expand_as(tokens),
            context=self.context(samples, step, key),
            part=torch.where(is_edited, _EDITED, _MASKED),
        )
