"""Scores rows with the reference network, for evaluation of a checkpoint on one device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from megamask.models.reference import ReferenceModel
from megamask.objectives.base import Rows
from megamask.objectives.divergence import Noised, divergence

_LOGIT_ROWS = 2048  # rows of [.., vocabulary] float32 logits at a time


@dataclass(frozen=True, kw_only=True)
class ReferenceScore:
    """A Score (see likelihood.py) over the reference network.

    Args:
        excluded_ids: ids outside the softmax, as the model was trained (`Objective.excluded_ids`).
        not_noise: ids that interpolating noise never writes (`never_written`); only such noise asks for them.
    """

    network: ReferenceModel
    excluded_ids: frozenset[int]
    not_noise: frozenset[int] = frozenset()

    @torch.no_grad()
    def __call__(self, rows: Rows) -> Tensor:
        """Sum of weight * cross entropy over the scored positions of each row: float64 [r], nats."""
        chosen = rows.is_scored
        hidden = self.network(rows.inputs, rows.context)[chosen]
        targets, weight = rows.targets[chosen], rows.weight[chosen].to(torch.float64)
        row = torch.arange(len(chosen), device=chosen.device)[:, None].expand_as(chosen)[chosen]
        read, noised = rows.inputs[chosen], None if rows.noised is None else _chosen(rows.noised, chosen)
        sums = torch.zeros(len(chosen), dtype=torch.float64, device=chosen.device)
        for start in range(0, len(targets), _LOGIT_ROWS):
            part = slice(start, start + _LOGIT_ROWS)
            logits = self.network.logits(hidden[part], excluded_ids=self.excluded_ids)
            losses = self._costs(logits.float(), targets[part], read[part], noised, part)
            sums.index_add_(0, row[part], losses.to(torch.float64) * weight[part])
        return sums

    def _costs(self, logits: Tensor, targets: Tensor, read: Tensor, noised: Noised | None, part: slice) -> Tensor:
        if noised is None:
            return functional.cross_entropy(logits, targets, reduction="none")
        can_be_noise = torch.ones(logits.size(1), dtype=torch.bool, device=logits.device)
        can_be_noise[sorted(self.not_noise)] = False
        return divergence(logits.log_softmax(dim=1), targets, read, noised.rows(part), can_be_noise)


def _chosen(noised: Noised, is_scored: Tensor) -> Noised:
    return Noised(alpha=noised.alpha[is_scored], token_mass=noised.token_mass[is_scored])
