"""OmegaConf as this project uses it: merging, and references that only paths may contain.

OmegaConf reads `${` in any string as a reference, `???` as a missing value and `\\` as an escape. Strings therefore
enter it encoded; only the references of a path keep their meaning. Types and ranges are checked before a value gets
here, because OmegaConf's own typed nodes convert silently ("12" to 12, 170 to "170").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from megamask.config.keys import Key, all_keys, all_sections
from megamask.config.paths import SECTION, map_paths

# NUL is refused in every value, so an encoded character cannot be confused with a given one.
_CODES = (("\\", "\0b"), ("???", "\0q"), ("${", "\0r"))
_MISSING = "???"


class Tree:
    """A settings tree that layers are merged into."""

    def __init__(self, root: type) -> None:
        self._root = root
        self._config: DictConfig = OmegaConf.create()
        self._layer: dict[str, Any] = {}
        for key in all_keys(root).values():
            self._place(key, None, _MISSING if key.is_required else _encode(key, key.default))
        self.merge()

    def add(self, key: Key, entry: str | None, value: Any) -> None:
        """Add one value, or one entry of a mapping, to the layer that `merge` merges."""
        self._place(key, entry, _encode(key, value))

    def _place(self, key: Key, entry: str | None, encoded: Any) -> None:
        parts = key.name.split(".") if entry is None else [*key.name.split("."), entry]
        inside = self._layer
        for part in parts[:-1]:
            inside = inside.setdefault(part, {})
        inside[parts[-1]] = encoded

    def merge(self) -> None:
        """Merge the layer over those before it and begin the next."""
        self._config.merge_with(self._layer)
        self._layer = {}

    def remove(self, key: Key, entry: str) -> None:
        """Remove an entry of a mapping; a required mapping without entries is missing again."""
        *sections, last = key.name.split(".")
        section = self._config
        for name in sections:
            section = section[name]
        left = {name: text for name, text in self._raw()[key.name].items() if name != entry}
        section[last] = left or (_MISSING if key.is_required else {})

    def missing(self) -> set[str]:
        """Return the keys that must be given and were not."""
        return {name for name, value in self._raw().items() if value == _MISSING}

    def given_paths(self) -> dict[str, str]:
        """Return the entries of the `paths` section as they were given."""
        return dict(_decode(self._raw()[SECTION]))

    def path_texts(self) -> Iterator[tuple[str, str]]:
        """Yield (key, text) of every path as it was given; entries of mappings have keys of their own."""
        for name, value in self._raw().items():
            if all_keys(self._root)[name].setting.is_path:
                entries = value if isinstance(value, dict) else {"": value}
                for entry, below in entries.items():
                    texts: list[str] = []
                    map_paths(_decode(below), lambda text, texts=texts: texts.append(text) or text)  # type: ignore[misc]
                    yield from ((f"{name}.{entry}" if entry else name, text) for text in texts)

    def build(self, finish_path: Callable[[str, str], str]) -> Any:
        """Return the frozen tree, its references resolved.

        Args:
            finish_path: called with the key and the resolved text of each path; returns the text to use.
        """
        values = {name: _decode(value) for name, value in self._raw(resolve=True).items()}
        for name, value in values.items():
            if not all_keys(self._root)[name].setting.is_path:
                continue
            if isinstance(value, dict):
                values[name] = {entry: finish_path(f"{name}.{entry}", text) for entry, text in value.items()}
            else:
                values[name] = map_paths(value, lambda text, name=name: finish_path(name, text))  # type: ignore[misc]
        return _build(self._root, "", values, all_sections(self._root))

    def _raw(self, *, resolve: bool = False) -> dict[str, Any]:
        """Return the encoded value of each key."""
        plain: Any = OmegaConf.to_container(self._config, resolve=resolve)
        values = {}
        for name in all_keys(self._root):
            value = plain
            for part in name.split("."):
                value = value[part]
            values[name] = value
        return values


def _build(root: type, prefix: str, values: dict[str, Any], sections: dict[str, type]) -> Any:
    arguments: dict[str, Any] = {}
    for name in (field.name for field in dataclasses.fields(root)):
        section = sections.get(prefix + name)
        arguments[name] = (
            values[prefix + name] if section is None else _build(section, f"{prefix}{name}.", values, sections)
        )
    return root(**arguments)


def _encode(key: Key, value: Any) -> Any:
    """Return a value that OmegaConf keeps as it is, except for the references of a path."""
    if not key.setting.is_path:
        return _mapped(value, lambda text: _replaced(text, _CODES))
    # what is not a path inside a path key, as a licence of an input, keeps `${` too
    inner = map_paths(value, lambda text: text.replace("${", "\0p"))
    return _mapped(inner, lambda text: _replaced(text, _CODES).replace("\0p", "${"))


def _decode(value: Any) -> Any:
    return _mapped(value, lambda text: _replaced(text, [(code, plain) for plain, code in _CODES]))


def _mapped(value: Any, function: Callable[[str], str]) -> Any:
    """Return a value with the function applied to its strings."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, list):
        return [_mapped(item, function) for item in value]
    if isinstance(value, dict):
        return {name: _mapped(item, function) for name, item in value.items()}
    return value


def _replaced(text: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        text = text.replace(old, new)
    return text
