"""Validation of a config's settings against one another, before any process or device is used."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from megamask.config.identity import value_of
from megamask.config.keys import all_sections
from megamask.config.load import DEFAULT_ORIGIN, OVERRIDE_ORIGIN
from megamask.config.rules.problem import Problem
from megamask.config.schema.roots import PrepareConfig, TrainConfig
from megamask.config.variants import variant_problems
from megamask.errors import UsageError


def validate_train(config: TrainConfig, origins: Mapping[str, str] | None = None) -> None:
    """Refuse a training config whose parts do not fit.

    Args:
        origins: of `Loaded`, so that the message can name file and line.

    Raises:
        UsageError: the first problem: key and value, reason, allowed values, where to change it.
    """
    refuse_first(_checked(config, origins), config, origins)


def validate_prepare(config: PrepareConfig, origins: Mapping[str, str] | None = None) -> None:
    """Refuse a config of a corpus' preparation whose parts do not fit; raises like `validate_train`."""
    refuse_first(_checked(config, origins), config, origins)


def all_problems(config: TrainConfig | PrepareConfig) -> Iterator[Problem]:
    """Every problem of a config, section by section in the schema's order."""
    root: type = type(config)
    for name in all_sections(root):
        yield from value_of(config, name).problems(config)


def refuse_first(
    problems: Iterator[Problem], config: TrainConfig | PrepareConfig, origins: Mapping[str, str] | None
) -> None:
    """Raise the first of the problems.

    Raises:
        UsageError: key and value, reason, allowed values, and where to change it.
    """
    for problem in problems:
        raise UsageError(
            f"{problem.description(value_of(config, problem.key))}. Nothing was started.",
            hint=_where_to_change(problem.key, origins),
        )


def _checked(config: TrainConfig | PrepareConfig, origins: Mapping[str, str] | None) -> Iterator[Problem]:
    return itertools.chain(variant_problems(config, origins, default_origin=DEFAULT_ORIGIN), all_problems(config))


def _where_to_change(key: str, origins: Mapping[str, str] | None) -> str | None:
    if origins is None:
        return None
    origin = origins.get(key)
    if origin is None:  # a mapping: its entries have the origins
        origin = next((place for name, place in origins.items() if name.startswith(f"{key}.")), DEFAULT_ORIGIN)
    if origin == OVERRIDE_ORIGIN:
        return f"change {key} on the command line"
    if origin == DEFAULT_ORIGIN:
        return f"{key} has its default; set it in the config or as {key}=..."
    return f"change {key} in {origin}"
