"""Explanation of a setting: meaning, allowed values, present value and its origin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from typing import Any

from megamask.config.identity import value_of
from megamask.config.keys import Key, all_keys, all_sections, find_key, nearest_of
from megamask.config.lines import entries_of
from megamask.config.load import Loaded, load_config, read_layers
from megamask.config.schema.roots import PrepareConfig, TrainConfig
from megamask.errors import UsageError

ROOTS: Mapping[str, type] = {"train": TrainConfig, "prepare": PrepareConfig}

_KINDS = {
    "identity": "shapes the result; a run never changes it",
    "extendable": "may only grow from one attempt to the next",
    "operational": "may change with every attempt",
}


def explain(name: str | None, path: str | None = None, overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Explain a key, the keys of a section, or every key.

    Args:
        name: a dotted key, an entry of a mapping (data.corpora.main), a section, or None for everything.
        path: a config whose values and their origins are wanted too; with name None it decides the tree.
        overrides: key.path=value, on top of that config.

    Returns:
        One object a key: key, command, doc, type, unit, default, required, allowed, kind, kind_meaning and, with a
        config, value and set_by (file:line, "override" or "default").

    Raises:
        UsageError: no such key; or the config is wrong.
    """
    loaded: Loaded[Any] | None = None
    roots = list(ROOTS.values()) if name is None else [_root_of(name)]
    if path is not None:
        roots = [_root_of_file(path)] if name is None else roots
        loaded = load_config(roots[0], path, overrides)
    return [_describe(key, shown_as, root, loaded) for root in roots for shown_as, key in _selected(name, root, loaded)]


def _root_of(name: str) -> type:
    for root in ROOTS.values():
        if name in all_sections(root) or find_key(name, root) is not None:
            return root
    candidates = [candidate for root in ROOTS.values() for candidate in (*all_keys(root), *all_sections(root))]
    raise UsageError(f"unknown key {name}", hint=f"did you mean {nearest_of(name, candidates)}?")


def _root_of_file(path: str) -> type:
    """Return which of the two trees a file's layers describe."""
    names = {key for _, document in read_layers(path) if document is not None for key, _, _ in entries_of(document)}
    return max(ROOTS.values(), key=lambda root: len(names & set(all_sections(root))))


def _selected(name: str | None, root: type, loaded: Loaded[Any] | None) -> list[tuple[str, Key]]:
    """(name to show, key) of each key that is asked for; with a config a mapping shows its entries."""
    keys = all_keys(root)
    if name is not None and name not in keys and name not in all_sections(root):
        return [(name, key)] if (key := find_key(name, root)) is not None else []
    selected: list[tuple[str, Key]] = []
    for key_name, key in keys.items():
        if name is None or key_name == name or key_name.startswith(f"{name}."):
            entries = [] if loaded is None else [e for e in loaded.origins if e.startswith(f"{key_name}.")]
            selected += [(entry, key) for entry in entries or [key_name]]
    return selected


def _describe(key: Key, shown_as: str, root: type, loaded: Loaded[Any] | None) -> dict[str, Any]:
    setting = key.setting
    entry = shown_as.removeprefix(f"{key.name}.") if shown_as != key.name else None
    description: dict[str, Any] = {
        "key": shown_as,
        "command": next(command for command, kind in ROOTS.items() if kind is root),
        "doc": setting.doc,
        "type": "str" if entry else key.type_name,
        "unit": setting.unit,
        "default": None if key.default is MISSING else key.default,
        "required": key.is_required,
        "allowed": "a string" if entry else key.allowed,
        "kind": setting.kind,
        "kind_meaning": _KINDS[setting.kind],
    }
    if setting.variants is not None:
        description["only_with"] = f"{key.name.rpartition('.')[0]}.name={'|'.join(setting.variants)}"
    if loaded is not None:
        value = value_of(loaded.config, key.name)
        description["value"] = value.get(entry) if entry else value
        description["set_by"] = loaded.origins.get(shown_as, "nothing")
    return description
