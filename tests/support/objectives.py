"""Objectives and scores for tests that need some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megamask.models.vocabulary import Vocabulary
from megamask.objectives.base import Rows
from megamask.objectives.masked import MaskedObjective


def masked_objective(vocabulary: Vocabulary, **changes: Any) -> MaskedObjective:
    """The pair with the linear schedule, unless a test changes it."""
    settings = {"noise_schedule": "linear", "complementary": True, "mask_logit": "excluded"} | changes
    return MaskedObjective(vocabulary=vocabulary, **settings)


def on_rows(score: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Rows], Tensor]:
    """A score of rows from one of (x_t, x_0, is_masked)."""
    return lambda rows: score(rows.inputs, rows.targets, rows.is_scored)
