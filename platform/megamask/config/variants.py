"""Tagged unions: a section whose `name` decides which of its other keys have a meaning.

A key without a meaning for the chosen variant is refused where it is given, and it is part neither of the run's
identity nor of a stored config.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import reduce
from typing import Any

from megamask.config.keys import Key, all_keys
from megamask.config.rules.problem import Problem

_TAG = "name"


def meaningless_keys(config: Any) -> set[str]:
    """The dotted keys of a config that have no meaning for the variants that it chooses."""
    root: type = type(config)
    return {
        name
        for name, key in all_keys(root).items()
        if key.setting.variants is not None and _value(config, _tag_of(name)) not in key.setting.variants
    }


def variant_problems(config: Any, origins: Mapping[str, str] | None, *, default_origin: str) -> Iterator[Problem]:
    """Yield the keys that were given without a meaning.

    Args:
        origins: of each key; without them, a key counts as given if it differs from its default.
        default_origin: of a key that was not given.
    """
    root: type = type(config)
    keys = all_keys(root)
    for name in sorted(meaningless_keys(config), key=list(keys).index):
        if _is_given(config, keys[name], origins, default_origin):
            tag = _tag_of(name)
            yield Problem(
                key=name,
                because=f"but {tag} is {_value(config, tag)}, for which this key has no meaning",
                allowed=f"to leave it out; it belongs to {tag}={'|'.join(keys[name].setting.variants or ())}",
            )


def _is_given(config: Any, key: Key, origins: Mapping[str, str] | None, default_origin: str) -> bool:
    if origins is not None:
        return origins.get(key.name, default_origin) != default_origin
    return bool(_value(config, key.name) != key.default)


def _tag_of(name: str) -> str:
    return f"{name.rpartition('.')[0]}.{_TAG}"


def _value(config: Any, name: str) -> Any:
    return reduce(getattr, name.split("."), config)
