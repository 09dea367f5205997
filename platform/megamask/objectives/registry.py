"""The objectives by name: from a config section, from a run's recorded identity, and from a model's record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megamask.errors import UsageError
from megamask.models.vocabulary import Vocabulary
from megamask.objectives.autoregressive import AutoregressiveObjective
from megamask.objectives.base import Objective
from megamask.objectives.block import BlockObjective
from megamask.objectives.masked import MaskedObjective
from megamask.objectives.shapes import name_of


def _masked(vocabulary: Vocabulary, settings: Mapping[str, Any]) -> Objective:
    return MaskedObjective(vocabulary=vocabulary, **settings)


def _autoregressive(vocabulary: Vocabulary, settings: Mapping[str, Any]) -> Objective:
    return AutoregressiveObjective(vocabulary=vocabulary, **settings)


def _block(vocabulary: Vocabulary, settings: Mapping[str, Any]) -> Objective:
    return BlockObjective(vocabulary=vocabulary, **settings)


_OBJECTIVES: Mapping[str, Callable[[Vocabulary, Mapping[str, Any]], Objective]] = {
    "masked": _masked,
    "autoregressive": _autoregressive,
    "block": _block,
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
    return _OBJECTIVES[name](vocabulary, {key: value for key, value in settings.items() if key != "name"})
