"""The network's side of decoding: what it would write at the open positions, and how sure it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from megamask.diffusion.sampling import Draw, Prediction, choose, score_slice
from megamask.models.reference import ReferenceModel
from megamask.models.vocabulary import Vocabulary
from megamask.objectives.base import Reading, is_excluded, never_written

_LOGIT_ROWS = 128  # rows of [.., vocabulary] float64 logits and noise at a time


class Predictor(Protocol):
    """A network that chooses tokens: the reference network here, the engine's under any layout."""

    def __call__(self, reading: Reading, draw: Draw) -> Prediction:
        """One forward pass over all rows; the answer is of the positions read, row by row.

        Neither the mask token nor padding is ever chosen, and neither takes part in the probabilities.
        """


@dataclass(frozen=True, kw_only=True)
class ReferencePredictor:
    """Chooses with the reference network, from the logits of all tokens on one device."""

    network: ReferenceModel
    vocabulary: Vocabulary

    @torch.no_grad()
    def __call__(self, reading: Reading, draw: Draw) -> Prediction:
        """See Predictor."""
        hidden = self.network(reading.inputs, reading.context)
        ids = torch.arange(self.vocabulary.vocab_size, device=hidden.device)
        never = is_excluded(ids, self.vocabulary, never_written(self.vocabulary))
        rows, places = reading.is_read.nonzero(as_tuple=True)
        parts = [
            score_slice(
                self.network.logits(hidden[row, place], excluded_ids=frozenset()),
                place + reading.shift,
                row,
                num_positions=reading.num_positions,
                vocab_size=self.vocabulary.vocab_size,
                first_token=0,
                is_excluded=never,
                draw=draw,
            )
            for row, place in zip(torch.split(rows, _LOGIT_ROWS), torch.split(places, _LOGIT_ROWS), strict=True)
        ]
        return choose(torch.cat(parts, dim=1)[None])
