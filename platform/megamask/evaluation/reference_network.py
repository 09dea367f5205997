"""Scores masked tokens with the reference network, for evaluation of a checkpoint on one device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from megamask.models.reference import ReferenceModel
from megamask.models.vocabulary import Vocabulary

_LOGIT_ROWS = 2048  # rows of [.., vocabulary] float32 logits at a time


@dataclass(frozen=True, kw_only=True)
class ReferenceCrossEntropy:
    """A SumCrossEntropy (see likelihood.py) over the reference network.

    Args:
        mask_logit: "excluded" or "included", as the model was trained.
    """

    network: ReferenceModel
    vocabulary: Vocabulary
    mask_logit: str

    @torch.no_grad()
    def __call__(self, x_t: Tensor, x_0: Tensor, is_masked: Tensor) -> Tensor:
        """Sum of cross entropy over the masked positions of each row: float64 [b], nats."""
        hidden = self.network(x_t)[is_masked]
        targets = x_0[is_masked]
        row = torch.arange(len(x_t), device=x_t.device)[:, None].expand_as(x_t)[is_masked]
        sums = torch.zeros(len(x_t), dtype=torch.float64, device=x_t.device)
        for start in range(0, len(targets), _LOGIT_ROWS):
            part = slice(start, start + _LOGIT_ROWS)
            logits = self.network.logits(hidden[part], vocabulary=self.vocabulary, mask_logit=self.mask_logit)
            losses = functional.cross_entropy(logits.float(), targets[part], reduction="none")
            sums.index_add_(0, row[part], losses.to(torch.float64))
        return sums
