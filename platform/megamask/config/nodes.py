"""YAML as a tree in which every key remembers its line.

A plain subset: no tags, anchors, aliases, merge keys, interpolation, duplicate keys or second documents; each of them
would make a value depend on something that its line does not show. Scalars follow YAML 1.2's core schema, so `no` is a
string, `010` is not a number, and 1e-3 is one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

from megamask.errors import UsageError

_MAX_DEPTH = 16
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,99})")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NON_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")


@dataclass(frozen=True, kw_only=True)
class Node:
    """One value of a YAML document; exactly one of text, items and entries is set.

    Args:
        line: where it begins, from 1.
        text: of a scalar.
        is_plain: the scalar is not quoted, so that its text decides its type.
        items: of a list.
        entries: of a mapping: key -> (line of the key, value).
    """

    line: int
    text: str | None = None
    is_plain: bool = False
    items: list[Node] | None = None
    entries: dict[str, tuple[int, Node]] | None = field(default=None)

    @property
    def value(self) -> Any:
        """The value as Python has it: None, bool, int, float, str, list or dict."""
        if self.items is not None:
            return [item.value for item in self.items]
        if self.entries is not None:
            return {key: child.value for key, (_, child) in self.entries.items()}
        text = self.text or ""
        return resolve_plain(text) if self.is_plain else text


def resolve_plain(text: str) -> bool | int | float | str | None:
    """What an unquoted scalar means."""
    if text in _NULL:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _NON_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    if _FLOAT.fullmatch(text) and not _LEADING_ZERO.fullmatch(text):
        return float(text)
    return text


def parse_yaml(text: str, source: str | None) -> Node | None:
    """The one document of a YAML text, or None when it is empty.

    Args:
        source: the file's name, for error messages; None for an override.

    Raises:
        UsageError: not YAML, or outside of the subset; names file and line.
    """
    return _Composer(text, source).document()


class _Composer:
    """Builds nodes from the parser's events."""

    def __init__(self, text: str, source: str | None) -> None:
        self._source = source
        self._events = self._parse(text)

    def _parse(self, text: str) -> Iterator[Any]:
        try:
            yield from yaml.parse(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            self._refuse(line, f"not valid YAML: {error.problem or error.context}")
        except yaml.reader.ReaderError as error:
            self._refuse(text.count("\n", 0, error.position) + 1, f"not valid YAML: {error.reason}")
        except (ValueError, OverflowError) as error:  # the parser's own limits, as an escape beyond Unicode
            self._refuse(1, f"not valid YAML: {error}")

    def document(self) -> Node | None:
        root = None
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                if root is not None:
                    self._refuse(_line(event), "a second document begins; allowed: one")
                root = self._node(next(self._events), depth=0)
        if root is not None and root.is_plain and root.text == "":
            return None
        return root

    def _node(self, event: Any, *, depth: int) -> Node:
        line = _line(event)
        if isinstance(event, yaml.AliasEvent):
            self._refuse(line, f"the alias *{event.anchor} is not supported; write the value out, or quote it")
        if event.anchor is not None:
            self._refuse(line, f"the anchor &{event.anchor} is not supported; write the value out, or quote it")
        if event.tag is not None:
            self._refuse(line, f"the tag {event.tag} is not supported; remove it, or quote the value")
        if depth > _MAX_DEPTH:
            self._refuse(line, f"nested deeper than {_MAX_DEPTH} levels")
        if isinstance(event, yaml.ScalarEvent):
            self._refuse_interpolation(event.value, line)
            return Node(line=line, text=event.value, is_plain=event.style is None)
        if isinstance(event, yaml.SequenceStartEvent):
            return Node(line=line, items=self._items(depth))
        return Node(line=line, entries=self._entries(depth))

    def _items(self, depth: int) -> list[Node]:
        items = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            items.append(self._node(event, depth=depth + 1))
        return items

    def _entries(self, depth: int) -> dict[str, tuple[int, Node]]:
        entries: dict[str, tuple[int, Node]] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._node(event, depth=depth + 1)
            if key.text is None:
                self._refuse(key.line, "a list or mapping stands where a key is expected")
            if key.is_plain and key.text == "<<":
                self._refuse(key.line, "the merge key << is not supported; use a `defaults:` list of files")
            if key.text in entries:
                self._refuse(key.line, f"the key {key.text} is given twice, first in line {entries[key.text][0]}")
            entries[key.text] = (key.line, self._node(next(self._events), depth=depth + 1))
        return entries

    def _refuse_interpolation(self, text: str, line: int) -> None:
        if "${" in text:
            self._refuse(line, "interpolation with ${...} is not supported; write the value out")

    def _refuse(self, line: int, problem: str) -> NoReturn:
        where = "the override" if self._source is None else f"{self._source}:{line}"
        raise UsageError(f"{where}: {problem}. Nothing was started.")


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1
