"""The objectives by name: from a config section, from a run's recorded identity, and from a model's record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from megamask.errors import UsageError
from megamask.models.vocabulary import Vocabulary
from megamask.objectives.autoregressive import AutoregressiveObjective
from megamask.objectives.base import Objective
from megamask.objectives.block import BlockObjective
from megamask.objectives.masked import MaskedObjective
from megamask.objectives.mixed import MixedObjective
from megamask.objectives.phased import PHASES_KEY, PhasedObjective
from megamask.objectives.schedule import Phases
from megamask.objectives.shapes import name_of
from megamask.objectives.shifted import SHIFT_KEY, with_shift
from megamask.objectives.uniform import UniformObjective


def _masked(vocabulary: Vocabulary, settings: Mapping[str, Any]) -> Objective:
    return MaskedObjective(vocabulary=vocabulary, **settings)


def _autoregressive(vocabulary: Vocabulary, settings: Mapping[str, Any]) -> Objective:
    return AutoregressiveObjective(vocabulary=vocabulary, **settings)


def _block(vocabulary: Vocabulary, settings: Mapping[str, Any]) -> Objective:
    return BlockObjective(vocabulary=vocabulary, **settings)


def _uniform(vocabulary: Vocabulary, settings: Mapping[str, Any]) -> Objective:
    return UniformObjective(vocabulary=vocabulary, **settings)


def _mixed(vocabulary: Vocabulary, settings: Mapping[str, Any]) -> Objective:
    return MixedObjective(vocabulary=vocabulary, **settings)


_OBJECTIVES: Mapping[str, Callable[[Vocabulary, Mapping[str, Any]], Objective]] = {
    "masked": _masked,
    "autoregressive": _autoregressive,
    "block": _block,
    "uniform": _uniform,
    "mixed": _mixed,
}


def build_objective(settings: Mapping[str, Any], vocabulary: Vocabulary) -> Objective:
    """The objective of some settings by name: those of a config section, or of a record.

    Args:
        settings: `name` and the settings that have a meaning for it; without a name, masked diffusion.

    Raises:
        UsageError: no such objective, or a value that it does not have.
        TypeError: a setting is missing, or without a meaning for it.
    """
    name = name_of(settings)
    if name not in _OBJECTIVES:
        raise UsageError(f"objective.name is {name!r}; allowed: {', '.join(_OBJECTIVES)}. Nothing was started.")
    own = {key: value for key, value in settings.items() if key not in ("name", SHIFT_KEY, PHASES_KEY)}
    if PHASES_KEY in settings:
        return with_shift(_recorded_phases(settings, vocabulary), settings.get(SHIFT_KEY, False))
    return with_shift(_OBJECTIVES[name](vocabulary, own), settings.get(SHIFT_KEY, False))


def _recorded_phases(record: Mapping[str, Any], vocabulary: Vocabulary) -> PhasedObjective:
    phases = []
    for entry in record[PHASES_KEY]:
        settings = {key: value for key, value in entry.items() if key != "first_step"}
        phases.append((entry["first_step"], build_objective(settings, vocabulary)))
    firsts = [first for first, _ in phases]
    if firsts[:1] != [1] or firsts != sorted(set(firsts)) or not all(type(first) is int for first in firsts):
        raise UsageError(f"objective.{PHASES_KEY} begin at {firsts}; allowed: 1, then later steps in order.")
    objective = PhasedObjective(phases=tuple(phases))
    if objective.record() != {key: value for key, value in record.items() if key != SHIFT_KEY}:
        raise UsageError(f"objective.{PHASES_KEY} ends with another objective than the one beside it.")
    return objective


def build_phases(
    phases: Phases, vocabulary: Vocabulary, *, information: Callable[[], Tensor] | None = None
) -> Objective:
    """The objective of a run, with its phases where there is more than one. Raises as `build_objective`.

    Args:
        information: of the corpus' tokens, for the schedule spindle; asked for only then.
    """
    built = []
    for first, settings in phases:
        table = {}
        if settings.get("noise_schedule") == "spindle" and information is not None:
            table = {"information": information()}
        built.append((first, build_objective(settings | table, vocabulary)))
    return built[0][1] if len(built) == 1 else PhasedObjective(phases=tuple(built))
