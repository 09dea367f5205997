"""The objective that a network was last trained for: which phase, and with a target shift or without.

Bound, decoder and export of a network follow the step that it was trained up to, never what the run will train later.
"""

from __future__ import annotations

from typing import Any

from megamask.objectives.base import Objective
from megamask.objectives.phased import PhasedObjective
from megamask.objectives.probing import Probed
from megamask.objectives.shifted import SHIFT_KEY, Shifted, ShiftedProbe
from megamask.objectives.warm_start import WarmStart
from megamask.objectives.wrapped import Wrapped

_OF_A_BOUND = ("name", "block_size", SHIFT_KEY)


def at_step(objective: Objective, step: int) -> Objective:
    """The objective as a network after this many steps was trained for it; before the first step, that of the first.

    What eases the first steps (warm_start.py) is no part of it.
    """
    if isinstance(objective, WarmStart):
        return at_step(objective.inner, step)
    if isinstance(objective, Shifted):
        inner = at_step(objective.inner, step)
        return Shifted(inner=inner) if objective.is_active(step) else inner
    return objective.at(max(1, step))


def first_steps(objective: Objective) -> list[int]:
    """The steps (from 1) at which the objective becomes another one, ascending; the first is 1."""
    found = {1}
    if isinstance(objective, Shifted) and objective.until_step is not None:
        found.add(objective.until_step + 1)
    if isinstance(objective, Wrapped):
        found |= set(first_steps(objective.inner))
    if isinstance(objective, PhasedObjective):
        found |= {first for first, _ in objective.phases}
    return sorted(found)


def each_in_force(objective: Objective) -> list[Objective]:
    """The objectives that follow one another, in order."""
    return [at_step(objective, first) for first in first_steps(objective)]


def newest_pair(objective: Objective, step: int) -> Objective:
    """Of the objectives up to a step, the newest with two views of each sample.

    Raises:
        ValueError: none has.
    """
    begun = [at_step(objective, first) for first in first_steps(objective) if first <= max(1, step)]
    pairs = [each for each in begun if each.shape(1).num_views == 2]
    if not pairs:
        raise ValueError("no phase up to this step has a complementary pair")
    return pairs[-1]


def probed(objective: Objective, step: int) -> Probed | None:
    """The objective after a step, where its loss can be measured part by part; None where it cannot."""
    trained = at_step(objective, step)
    inner = trained.inner if isinstance(trained, Shifted) else trained
    if not isinstance(inner, Probed):
        return None
    return ShiftedProbe(inner=inner) if isinstance(trained, Shifted) else inner


def bound_record(objective: Objective, step: int) -> dict[str, Any]:
    """Return what a bound measured after this step bounds, in JSON types; empty for a run in which that never changes.

    `objective` has name, block size and shift. `bound_from_step` is the first step from which the bound is of that
    kind: bounds with different ones are of different quantities and are never compared.
    """
    if len({_kind(each) for each in each_in_force(objective)}) == 1:
        return {}
    now, start = at_step(objective, step), 1
    for first in first_steps(objective):
        if first <= max(1, step) and (first == 1 or _kind(at_step(objective, first - 1)) != _kind(now)):
            start = first
    return {
        "objective": {key: value for key, value in now.record().items() if key in _OF_A_BOUND},
        "bound_from_step": start,
    }


def _kind(objective: Objective) -> tuple[tuple[str, Any], ...]:
    record = objective.record()
    return tuple((key, record.get(key)) for key in _OF_A_BOUND)
