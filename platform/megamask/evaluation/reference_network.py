"""Scores rows with the reference network, for evaluation of a checkpoint on one device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from megamask.models.reference import ReferenceModel
from megamask.objectives.base import Rows

_LOGIT_ROWS = 2048  # rows of [.., vocabulary] float32 logits at a time


@dataclass(frozen=True, kw_only=True)
class ReferenceScore:
    """A Score (see likelihood.py) over the reference network.

    Args:
        excluded_ids: ids outside the softmax, as the model was trained (`Objective.excluded_ids`).
    """

    network: ReferenceModel
    excluded_ids: frozenset[int]

    @torch.no_grad()
    def __call__(self, rows: Rows) -> Tensor:
        """Sum of weight * cross entropy over the scored positions of each row: float64 [r], nats."""
        chosen = rows.is_scored
        hidden = self.network(rows.inputs, rows.context)[chosen]
        targets, weight = rows.targets[chosen], rows.weight[chosen].to(torch.float64)
        row = torch.arange(len(chosen), device=chosen.device)[:, None].expand_as(chosen)[chosen]
        sums = torch.zeros(len(chosen), dtype=torch.float64, device=chosen.device)
        for start in range(0, len(targets), _LOGIT_ROWS):
            part = slice(start, start + _LOGIT_ROWS)
            logits = self.network.logits(hidden[part], excluded_ids=self.excluded_ids)
            losses = functional.cross_entropy(logits.float(), targets[part], reduction="none")
            sums.index_add_(0, row[part], losses.to(torch.float64) * weight[part])
        return sums
