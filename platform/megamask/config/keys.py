"""The keys of a settings tree: name, type, allowed values, and the key nearest to a misspelt one."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import Any, Literal

from megamask.config.schema.field import Setting

Base = Literal["int", "float", "bool", "str", "list", "entries", "stages", "dict"]

_WORDS: dict[Base, str] = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "a string",
    "list": "a list of strings",
    "entries": "a list of strings and mappings of names to strings",
    "stages": "a list of mappings {until_tokens: INTEGER, weights: {NAME: NUMBER}, max_epochs: {NAME: NUMBER}}",
    "dict": "a mapping of names to strings",
}
_CLOSE_ENOUGH = 0.6


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a settings tree.

    Args:
        name: dotted, as training.steps.
        setting: its declaration in the schema.
        base: its type; list and dict hold strings.
        is_optional: null is allowed.
        default: dataclasses.MISSING where the key must be given.
    """

    name: str
    setting: Setting
    base: Base
    is_optional: bool
    default: Any

    @property
    def is_required(self) -> bool:
        """True if a config must set it."""
        return self.default is MISSING

    @property
    def type_name(self) -> str:
        """The type as the schema writes it, as "int | None"."""
        name = {
            "list": "list[str]",
            "entries": "list[str | dict[str, str]]",
            "stages": "list[dict[str, Any]]",
            "dict": "dict[str, str]",
        }.get(self.base, self.base)
        return f"{name} | None" if self.is_optional else name

    @property
    def allowed(self) -> str:
        """Type and range in words, as "an integer >= 1, or null"."""
        limits = self.setting.allowed()
        words = limits if self.base == "str" and limits else " ".join(filter(None, (_WORDS[self.base], limits)))
        return f"{words}, or null" if self.is_optional else words


@functools.cache
def all_keys(root: type) -> dict[str, Key]:
    """Every key below a root dataclass, in the schema's order."""
    keys: dict[str, Key] = {}
    for name, field, annotation in _fields(root):
        if "setting" not in field.metadata:
            keys.update({f"{name}.{key.name}": _below(name, key) for key in all_keys(annotation).values()})
            continue
        base, is_optional = _parse_annotation(annotation)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        keys[name] = Key(
            name=name, setting=field.metadata["setting"], base=base, is_optional=is_optional, default=default
        )
    return keys


@functools.cache
def all_sections(root: type) -> dict[str, type]:
    """Every section below a root dataclass by dotted name, in the schema's order."""
    sections: dict[str, type] = {}
    for name, field, annotation in _fields(root):
        if "setting" not in field.metadata:
            sections[name] = annotation
            sections.update({f"{name}.{below}": kind for below, kind in all_sections(annotation).items()})
    return sections


def find_key(name: str, root: type) -> Key | None:
    """The key of that name, or the mapping key of which the name is an entry (data.corpora.NAME), or None."""
    keys = all_keys(root)
    if name in keys:
        return keys[name]
    return next((key for key in keys.values() if key.base == "dict" and name.startswith(f"{key.name}.")), None)


def nearest(name: str, root: type) -> str:
    """Return the key or section that an unknown name most likely meant; there is always one.

    The same last part in another section comes first (model.tensor_parallel_size), then the closest spelling.
    """
    candidates = [*all_keys(root), *all_sections(root)]
    return nearest_of(name, candidates)


def nearest_of(name: str, candidates: Sequence[str]) -> str:
    """Return the candidate that an unknown name most likely meant; see `nearest`."""
    for candidate in candidates:  # only the case is wrong, or - is written for _
        if _normal(candidate) == _normal(name):
            return candidate
    name = _normal(name)
    last = name.rpartition(".")[2]
    if same := [candidate for candidate in candidates if candidate.rpartition(".")[2] == last]:
        return max(same, key=lambda candidate: _likeness(name, candidate))
    closest = max(candidates, key=lambda candidate: _likeness(name, candidate))
    if _likeness(name, closest) >= _CLOSE_ENOUGH:
        return closest
    return max(candidates, key=lambda candidate: _likeness(last, candidate.rpartition(".")[2]))


def _normal(name: str) -> str:
    return name.lower().replace("-", "_")


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _below(section: str, key: Key) -> Key:
    return dataclasses.replace(key, name=f"{section}.{key.name}")


def _fields(root: type) -> list[tuple[str, dataclasses.Field[Any], Any]]:
    annotations = typing.get_type_hints(root)
    return [(field.name, field, annotations[field.name]) for field in dataclasses.fields(root)]


def _parse_annotation(annotation: Any) -> tuple[Base, bool]:
    if isinstance(annotation, types.UnionType):
        members = [member for member in typing.get_args(annotation) if member is not types.NoneType]
        if len(members) != 1:
            raise TypeError(f"a setting has one type, or null; the schema has {annotation}")
        return _parse_annotation(members[0])[0], True
    simple: dict[Any, Base] = {int: "int", float: "float", bool: "bool", str: "str"}
    if annotation in simple:
        return simple[annotation], False
    if annotation == list[str]:
        return "list", False
    if annotation == list[str | dict[str, str]]:
        return "entries", False
    if annotation == list[dict[str, Any]]:
        return "stages", False
    if annotation == dict[str, str]:
        return "dict", False
    raise TypeError(f"settings of type {annotation} are not supported")
