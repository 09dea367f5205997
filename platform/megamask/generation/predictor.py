"""The network's side of decoding: what it would write at the open positions, and how sure it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megamask.diffusion.sampling import Draw, Prediction, choose, score_slice
from megamask.models.reference import ReferenceModel
from megamask.models.vocabulary import Vocabulary

_LOGIT_ROWS = 128  # rows of [.., vocabulary] float64 logits and noise at a time


class Predictor(Protocol):
    """A network that chooses tokens: the reference network here, the engine's under any layout."""

    def __call__(self, x_t: Tensor, is_open: Tensor, draw: Draw) -> Prediction:
        """One forward pass over all rows.

        Neither the mask token nor padding is ever chosen, and neither takes part in the probabilities.

        Shapes: x_t int64 [r, s]; is_open bool [r, s]; the answer is of the open positions, row by row.
        """


@dataclass(frozen=True, kw_only=True)
class ReferencePredictor:
    """Chooses with the reference network, from whole logits on one device."""

    network: ReferenceModel
    vocabulary: Vocabulary

    @torch.no_grad()
    def __call__(self, x_t: Tensor, is_open: Tensor, draw: Draw) -> Prediction:
        """See Predictor."""
        hidden = self.network(x_t).flatten(0, 1)
        ids = torch.arange(self.vocabulary.vocab_size, device=x_t.device)
        is_excluded = (ids == self.vocabulary.mask_token_id) | (ids == self.vocabulary.pad_token_id)
        parts = [
            score_slice(
                self.network.logits(hidden[indices], vocabulary=self.vocabulary, mask_logit="excluded"),
                indices,
                num_positions=x_t.size(1),
                vocab_size=self.vocabulary.vocab_size,
                first_token=0,
                is_excluded=is_excluded,
                draw=draw,
            )
            for indices in torch.split(is_open.flatten().nonzero()[:, 0], _LOGIT_ROWS)
        ]
        return choose(torch.cat(parts, dim=1)[None])
