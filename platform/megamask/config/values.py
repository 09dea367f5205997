"""Values of the right type and range from a file or the command line, or a clear refusal."""

from __future__ import annotations

import math
import re
from typing import Any

from yaml.nodes import MappingNode, Node, SequenceNode

from megamask.config.keys import Key, find_key
from megamask.config.lines import entries_of, null_node, parse_yaml, resolve_plain, string_node, value_of_node
from megamask.config.paths import check_path, map_paths
from megamask.config.secrets import check_no_secret, check_reference, shown
from megamask.errors import UsageError

_ENTRY_NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")


class _WrongType(Exception):
    """A value that is not of the key's type; the argument is a hint or None."""


def override_node(name: str, text: str, root: type) -> Node:
    """Return the node of an override's text.

    The text of a string key is taken as it is, because a shell has no types (`run.name=170`) and paths may hold any
    character; quotes around it are YAML's, and `null` or nothing is null where the key allows null. Every other key's
    text is YAML, as [a, b], true or 1e-3.

    Raises:
        UsageError: not YAML.
    """
    key = find_key(name, root)
    is_string = key is not None and (key.base == "str" or (key.base == "dict" and name != key.name))
    if is_string and text[:1] not in ("'", '"'):
        is_null = text in ("", "null") and key is not None and (key.is_optional or key.base == "dict")
        return null_node() if is_null else string_node(text)
    try:
        return parse_yaml(text, None) or null_node()
    except UsageError as error:
        # a bare * is YAML's sign of an alias, and what a user writes who means a glob
        hint = f"""quote what begins with *, as '{name}=["*.txt"]'""" if "*" in text else error.hint
        raise UsageError(f"{name} cannot be read: {error.message}", hint=hint) from error


def convert(key: Key, node: Node, where: str, *, entry: str | None = None) -> Any:
    """Return the value of a key.

    Args:
        where: "file:line" or "on the command line", for messages.
        entry: the dotted name of one entry of a mapping key; the node is that entry's.

    Raises:
        UsageError: wrong type, out of range, a path that names a variable, or a credential in a URI.
    """
    name = entry or key.name
    if key.is_optional and value_of_node(node) is None:
        return None
    try:
        if key.setting.takes_mapping and isinstance(node, MappingNode):
            value: Any = _mapping_as_text(key, node)
        else:
            value = _string(node) if entry else _CONVERTERS[key.base](node)
    except _WrongType as error:
        given, allowed = f"{shown(value_of_node(node))} ({_kind(node)})", "a string" if entry else key.allowed
        hint = str(error.args[0]) if error.args else None
        raise UsageError(f"{name} is {given}; allowed: {allowed} ({where}). Nothing was started.", hint=hint) from None
    for text in _strings(value):
        check_no_secret(name, text, where)
        check_reference(name, text, where)
        if "\0" in text:
            raise UsageError(f"{name} holds a NUL character ({where}). Nothing was started.")
        if any(0xD800 <= ord(letter) < 0xE000 for letter in text):  # also how undecodable bytes of a shell arrive
            raise UsageError(f"{name} is not Unicode text: it holds half a character ({where}). Nothing was started.")
    if key.setting.is_path:
        map_paths(value, lambda text: check_path(name, text, where))
    if key.base != "dict" and not key.setting.accepts(value):
        raise UsageError(f"{name} is {shown(value)}; allowed: {key.allowed} ({where}). Nothing was started.")
    return value


def check_entry_name(key: Key, name: str, where: str) -> None:
    """Refuse a mapping entry whose name is not a plain name.

    Raises:
        UsageError: names the key and where it was given.
    """
    if not _ENTRY_NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is not a name for an entry of {key.name}; allowed: {_ENTRY_NAME.pattern} ({where}). "
            "Nothing was started."
        )


def _integer(node: Node) -> int:
    value = value_of_node(node)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _WrongType
    return value


def _number(node: Node) -> float:
    value = value_of_node(node)
    if isinstance(value, str):  # "1e-3" in quotes, or as a tool without YAML 1.2 would write it
        value = resolve_plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _WrongType
    try:
        number = float(value)
    except OverflowError:
        raise _WrongType("it is too large for a floating-point number") from None
    if not math.isfinite(number):
        raise _WrongType("only finite numbers are allowed")
    return number


def _boolean(node: Node) -> bool:
    value = value_of_node(node)
    if not isinstance(value, bool):
        raise _WrongType
    return value


def _string(node: Node) -> str:
    value = value_of_node(node)
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        raise _WrongType(f'quote it: "{node.value}"')
    raise _WrongType


def _list(node: Node) -> list[str]:
    if not isinstance(node, SequenceNode):
        raise _WrongType("write a list, as [a, b]")
    return [_string(item) for item in node.value]


def _entries(node: Node) -> list[str | dict[str, str]]:
    if not isinstance(node, SequenceNode):
        raise _WrongType("write a list, as [a, {path: b}]")
    return [
        {name: _string(child) for name, _, child in entries_of(item)}
        if isinstance(item, MappingNode)
        else _string(item)
        for item in node.value
    ]


def _stages(node: Node) -> list[dict[str, Any]]:
    if not isinstance(node, SequenceNode) or not all(isinstance(item, MappingNode) for item in node.value):
        raise _WrongType("write a list, as [{until_tokens: 1000000, weights: {a: 1, b: 3}}, {weights: {a: 1}}]")
    return [_stage(item) for item in node.value]


def _stage(node: Node) -> dict[str, Any]:
    stage: dict[str, Any] = {}
    for name, _, child in entries_of(node):
        if name == "until_tokens":
            stage[name] = _integer(child)
        elif name in ("weights", "max_epochs") and isinstance(child, MappingNode):
            stage[name] = {source: _share(number) for source, _, number in entries_of(child)}
        else:
            raise _WrongType(
                f"a stage has until_tokens, weights and max_epochs, of which {name} is not one as it is written"
            )
    return stage


def _share(node: Node) -> int | float:
    """A number as it is written: 1 stays an integer."""
    value = value_of_node(node)
    return value if isinstance(value, int) and not isinstance(value, bool) else _number(node)


def _mapping(node: Node) -> dict[str, str]:
    if not isinstance(node, MappingNode):
        raise _WrongType("write a mapping of names, as {main: folder}")
    return {}  # its entries are converted one by one


def _mapping_as_text(key: Key, node: MappingNode) -> list[str] | str:
    """A mapping of names to numbers as the text that the key keeps."""
    pairs = [(name, _number(child)) for name, _, child in entries_of(node)]
    if key.base == "list":
        return [f"{name}={number:g}" for name, number in pairs]
    return "{" + ", ".join(f"{name}: {number:g}" for name, number in pairs) + "}"


_CONVERTERS = {
    "int": _integer,
    "float": _number,
    "bool": _boolean,
    "str": _string,
    "list": _list,
    "entries": _entries,
    "stages": _stages,
    "dict": _mapping,
}


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for item in value.values() for text in _strings(item)]
    return [text for item in value for text in _strings(item)] if isinstance(value, list) else []


def _kind(node: Node) -> str:
    if isinstance(node, SequenceNode):
        return "a list"
    if isinstance(node, MappingNode):
        return "a mapping"
    value = value_of_node(node)
    kinds = {bool: "a boolean", int: "an integer", float: "a number", str: "a string"}
    return next((words for kind, words in kinds.items() if isinstance(value, kind)), "no value")
