"""Numbers of a config.json: read, checked and refused by the name of their key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megamask.errors import UsageError


def unsupported(what: str, allowed: str) -> UsageError:
    """The refusal of a config.json."""
    return UsageError(
        f"config.json: {what}; supported: {allowed}. Nothing was converted.",
        hint="docs/guides/conversion.md lists what each family may contain",
    )


def integer(config: Mapping[str, Any], key: str, *, minimum: int = 1, default: int | None = None) -> int:
    """An integer.

    Raises:
        UsageError: it is missing or below the minimum.
    """
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or value < minimum:
        raise _refusal(config, key, "a positive integer" if minimum == 1 else f"an integer >= {minimum}")
    return value


def real(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A number above 0. Raises as `integer`."""
    value: Any = config.get(key)
    value = default if value is None else value
    if type(value) not in (int, float) or not value > 0:
        raise _refusal(config, key, "a positive number")
    return float(value)


def boolean(config: Mapping[str, Any], key: str) -> bool:
    """A truth value, false where it is missing. Raises as `integer`."""
    value = config.get(key)
    value = False if value is None else value
    if type(value) is not bool:
        raise _refusal(config, key, "true or false")
    return value


def _refusal(config: Mapping[str, Any], key: str, allowed: str) -> UsageError:
    return unsupported(f"{key} is {config[key]!r}" if key in config else f"{key} is missing", allowed)


def rope_theta(config: Mapping[str, Any], key: str = "rope_theta") -> float:
    """Base of the rotary frequencies.

    A default is never assumed: those of the published classes are wrong for some of the published weights.

    Raises:
        UsageError: no base is given, two differ, or the positions are scaled.
    """
    nested = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    for name, section in (("rope_parameters", nested), ("rope_scaling", scaling)):
        if not isinstance(section, Mapping):
            raise unsupported(f"{name} is {section!r}", "an object, or null")
        kind = section.get("rope_type", section.get("type", "default"))
        if kind != "default":
            raise unsupported(f"{name} scales the rotary positions ({kind})", "rope_type default: unscaled positions")
    given = [value for value in (config.get(key), nested.get("rope_theta")) if value is not None]
    if not given:
        raise unsupported(f"neither {key} nor rope_parameters.rope_theta is given", "one of the two")
    if len({float(value) for value in given}) > 1:
        raise unsupported(f"{key} is {given[0]} and rope_parameters.rope_theta is {given[1]}", "one value")
    return float(given[0])
