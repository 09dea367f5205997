"""Retention policy: the checkpoints to keep, from their facts alone; nothing here touches a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Facts of a committed checkpoint that the policy depends on.

    Args:
        is_good: it is not known to be damaged.
        is_pinned: a user asked to keep it.
        bound: nats per token, measured at its own step; None if it was not.
        bound_from_step: first step whose bounds are of the same kind.
    """

    name: str
    step: int
    attempt: int
    is_good: bool = True
    is_pinned: bool = False
    bound: float | None = None
    bound_from_step: int = 1

    @property
    def age(self) -> tuple[int, int]:
        """Greater is newer."""
        return self.step, self.attempt


def retained(
    candidates: Sequence[Candidate], *, keep_last: int, keep_every_steps: int | None = None, keep_best: int = 0
) -> set[str]:
    """The names of the checkpoints that stay.

    These are the newest `keep_last`, those whose step is a multiple of `keep_every_steps`, the `keep_best` with the
    lowest bound of the newest kind (the newer of two equal ones), and all that are pinned. Only good ones count for the
    first three; as long as fewer than `keep_last` are good, everything stays, so that a damaged one never pushes out a
    good one.
    """
    good = sorted((each for each in candidates if each.is_good), key=lambda each: each.age, reverse=True)
    if len(good) < keep_last:
        return {each.name for each in candidates}
    kept = [*good[:keep_last], *(each for each in candidates if each.is_pinned)]
    if keep_every_steps is not None:
        kept += [each for each in good if each.step % keep_every_steps == 0]
    measured = [(each.bound, each) for each in good if each.bound is not None and math.isfinite(each.bound)]
    newest = max((each.bound_from_step for _, each in measured), default=1)
    measured = [entry for entry in measured if entry[1].bound_from_step == newest]
    measured.sort(key=lambda entry: entry[0])  # stable: of equal bounds the newer stays in front
    kept += [each for _, each in measured[:keep_best]]
    return {each.name for each in kept}
