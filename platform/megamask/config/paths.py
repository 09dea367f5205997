"""Paths in a config: references to the `paths` section, the home folder, and what a shell would have replaced."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from megamask.config.keys import nearest_of
from megamask.config.secrets import shown
from megamask.errors import UsageError

SECTION = "paths"
_REFERENCE = re.compile(r"\$\{paths\.([A-Za-z0-9_-]{1,100})\}")
_VARIABLE = re.compile(r"\$\{?[A-Za-z_]")


def map_paths(value: Any, function: Callable[[str], str]) -> Any:
    """Return the value of a path key with the function applied to its paths.

    Of a mapping inside a list only the entry `path` is one.
    """
    if isinstance(value, str):
        return function(value)
    if isinstance(value, list):
        return [
            item | {"path": function(item["path"])}
            if isinstance(item, dict) and "path" in item
            else item
            if isinstance(item, dict)
            else function(item)
            for item in value
        ]
    return value


def references(text: str) -> list[str]:
    """Return the names of the `paths` section that a path refers to."""
    return _REFERENCE.findall(text)


def check_path(name: str, text: str, where: str) -> str:
    """Return a path, unless it is empty or names a variable; `${paths.NAME}` is the only reference.

    Raises:
        UsageError: names the key, the text and where it was given.
    """
    if not text:
        raise UsageError(
            f"{name} is '', which names no folder or file; allowed: a path ({where}). Nothing was started."
        )
    rest = _REFERENCE.sub("", text)
    if "${" in rest:
        raise UsageError(
            f"{name} is {shown(text)}; the only reference in a path is ${{paths.NAME}} ({where}). Nothing was started.",
            hint="environment variables and other keys are never read; write the path out, or name it under `paths:`",
        )
    if _VARIABLE.search(rest):
        raise UsageError(
            f"{name} is {shown(text)}, but environment variables are not read from a config ({where}). "
            "Nothing was started.",
            hint=f"write the path out, begin it with ~ for the home folder, or give {name}=... in a shell",
        )
    return text


def check_references(name: str, text: str, where: str, paths: Mapping[str, str]) -> None:
    """Refuse a reference to a name that the `paths` section does not have, or that leads back to itself.

    Args:
        paths: the entries of the section as they were given.

    Raises:
        UsageError: names the key, the reference and the nearest entry.
    """
    _follow(name, text, where, paths, seen=())


def _follow(name: str, text: str, where: str, paths: Mapping[str, str], *, seen: tuple[str, ...]) -> None:
    for entry in references(text):
        if entry not in paths:
            hint = f"did you mean paths.{nearest_of(entry, list(paths))}?" if paths else f"set paths.{entry}"
            raise UsageError(
                f"{name} refers to paths.{entry}, which is not set ({where}). Nothing was started.", hint=hint
            )
        if entry in seen:
            raise UsageError(f"{name} refers to paths.{entry}, which refers to itself ({where}). Nothing was started.")
        _follow(name, paths[entry], where, paths, seen=(*seen, entry))


def expand_home(name: str, text: str, where: str) -> str:
    """Replace a leading ~ or ~user by that home folder.

    Raises:
        UsageError: the home folder does not exist.
    """
    if not text.startswith("~"):
        return text
    expanded = os.path.expanduser(text)  # noqa: PTH111  Path would drop a trailing slash and "."
    if expanded.startswith("~"):
        raise UsageError(
            f"{name} is {shown(text)}, and there is no such home folder ({where}). Nothing was started.",
            hint="write ./~... for a folder whose name begins with ~",
        )
    return expanded
