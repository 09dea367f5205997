"""YAML in which every key keeps its line, and nothing is hidden from the line that a reader looks at.

A plain subset: no tags, anchors, aliases, merge keys, duplicate keys or second documents; each of them would make a
value depend on something that its line does not show. Scalars follow YAML 1.2's core schema, so `no` is a string,
`010` is not a number, and 1e-3 is one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from megamask.errors import UsageError

_MAX_DEPTH = 16
_PREFIX = "tag:yaml.org,2002:"
_STRING = f"{_PREFIX}str"
_NULL = f"{_PREFIX}null"
# The first that matches decides; a number with a leading zero is a string, because YAML versions differ on it.
_RESOLVERS = (
    (_NULL, r"(~|null|Null|NULL)?"),
    (f"{_PREFIX}bool", r"true|True|TRUE|false|False|FALSE"),
    (f"{_PREFIX}int", r"[-+]?(0|[1-9][0-9]{0,99})"),
    (_STRING, r"[-+]?0[0-9]+"),
    (f"{_PREFIX}float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"),
    (f"{_PREFIX}float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
)
_SCALARS: dict[str, Callable[[str], Any]] = {
    _NULL: lambda _: None,
    f"{_PREFIX}bool": lambda text: text.lower() == "true",
    f"{_PREFIX}int": int,
    f"{_PREFIX}float": lambda text: float(re.sub(r"\.(?=[inIN])", "", text)),
    _STRING: str,
}


class _Loader(yaml.SafeLoader):
    """PyYAML's composer, restricted to the subset; errors name file and line."""

    yaml_implicit_resolvers = {  # noqa: RUF012  PyYAML declares it for instances
        None: [(tag, re.compile(rf"(?:{pattern})\Z")) for tag, pattern in _RESOLVERS]
    }

    def __init__(self, text: str, source: str | None) -> None:
        self._source = source
        self._depth = -1
        super().__init__(text)

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """Compose the next node, unless its event is outside of the subset."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        line = _line(event.start_mark)
        if isinstance(event, yaml.AliasEvent):
            self.refuse(line, f"the alias *{event.anchor} is not supported; write the value out, or quote it")
        if event.anchor is not None:
            self.refuse(line, f"the anchor &{event.anchor} is not supported; write the value out, or quote it")
        if event.tag is not None:
            self.refuse(line, f"the tag {event.tag} is not supported; remove it, or quote the value")
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            self.refuse(line, f"nested deeper than {_MAX_DEPTH} levels")
        node: Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        """Compose a mapping whose keys are plain names, each given once."""
        mapping = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in mapping.value:
            line = line_of(key)
            if not isinstance(key, ScalarNode):
                self.refuse(line, "a list or mapping where a key is expected")
            if key.value == "<<" and key.style is None:
                self.refuse(line, "the merge key << is not supported; use a `defaults:` list of files")
            if key.value in lines:
                self.refuse(line, f"the key {key.value} is given twice, first in line {lines[key.value]}")
            lines[key.value] = line
        return mapping

    def refuse(self, line: int, problem: str) -> NoReturn:
        """Raise the error of a line."""
        _refuse(self._source, line, problem)


def parse_yaml(text: str, source: str | None) -> Node | None:
    """Return the one document of a YAML text, or None when it is empty.

    Args:
        source: the file's name, for error messages; None for an override.

    Raises:
        UsageError: not YAML, or outside of the subset; names file and line.
    """
    try:
        root: Node | None = _Loader(text, source).get_single_node()
    except yaml.composer.ComposerError as error:  # aliases never get this far
        _refuse(source, _line(error.problem_mark), "a second document begins; allowed: one")
    except yaml.MarkedYAMLError as error:
        line = _line(error.problem_mark) if error.problem_mark else 1
        _refuse(source, line, f"not valid YAML: {error.problem or error.context}")
    except yaml.reader.ReaderError as error:
        _refuse(source, text.count("\n", 0, error.position) + 1, f"not valid YAML: {error.reason}")
    except (ValueError, OverflowError) as error:  # limits of the parser, e.g. an escape beyond Unicode
        _refuse(source, 1, f"not valid YAML: {error}")
    is_empty = isinstance(root, ScalarNode) and root.style is None and root.value == ""
    return None if is_empty else root


def string_node(text: str) -> Node:
    """Return a scalar that is this string."""
    return ScalarNode(_STRING, text)


def null_node() -> Node:
    """Return a scalar that is null."""
    return ScalarNode(_NULL, "")


def value_of_node(node: Node) -> Any:
    """Return a node's value: None, bool, int, float, str, list or dict."""
    if isinstance(node, SequenceNode):
        return [value_of_node(item) for item in node.value]
    if isinstance(node, MappingNode):
        return {key.value: value_of_node(child) for key, child in node.value}
    return _SCALARS[node.tag](node.value)


def resolve_plain(text: str) -> bool | int | float | str | None:
    """Return the value of an unquoted scalar."""
    tag = next((tag for tag, pattern in _Loader.yaml_implicit_resolvers[None] if pattern.match(text)), _STRING)
    value: bool | int | float | str | None = _SCALARS[tag](text)
    return value


def entries_of(node: Node) -> Iterator[tuple[str, int, Node]]:
    """Yield (key, line of the key, value) of a mapping; nothing of any other node."""
    if isinstance(node, MappingNode):
        for key, child in node.value:
            yield key.value, line_of(key), child


def line_of(node: Node) -> int:
    """Return the line where a node begins, from 1; an override has line 1."""
    return _line(node.start_mark) if node.start_mark else 1


def _line(mark: Any) -> int:
    return int(mark.line) + 1


def _refuse(source: str | None, line: int, problem: str) -> NoReturn:
    where = "the override" if source is None else f"{source}:{line}"
    raise UsageError(f"{where}: {problem}. Nothing was started.")
