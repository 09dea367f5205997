"""From YAML layers and overrides to a config, with the origin of every key.

A file's `defaults:` lists other files, relative to itself; they are laid down depth first in that order, the file
itself on top of them, then the overrides `a.b=c`. Mappings merge, everything else is replaced. Every layer must be
right by itself: a mistake is an error even where a later layer hides it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from megamask.config.keys import Key, all_keys, all_sections, nearest
from megamask.config.nodes import Node, parse_yaml
from megamask.config.schema.roots import PrepareConfig, TrainConfig
from megamask.config.secrets import carries_credential
from megamask.config.values import check_entry_name, convert, override_node
from megamask.errors import UsageError

T = TypeVar("T", TrainConfig, PrepareConfig)

DEFAULT_ORIGIN = "default"
OVERRIDE_ORIGIN = "override"
# Far beyond any config; a file without an end, or defaults that name each other twice, must end too.
_MOST_BYTES = 1 << 20
_MOST_LAYERS = 100
_COMMANDS: dict[type, str] = {TrainConfig: "megamask train", PrepareConfig: "megamask prepare"}


@dataclass(frozen=True, kw_only=True)
class Loaded(Generic[T]):
    """A composed config and where each of its values came from.

    Args:
        config: the frozen tree.
        origins: dotted key -> "file:line", "override" or "default"; entries of mappings have keys of their own.
        sources: the files that were read, in the order in which they were laid down.
    """

    config: T
    origins: Mapping[str, str]
    sources: Sequence[str]


def load_train_config(path: str | Path, overrides: Sequence[str] = ()) -> Loaded[TrainConfig]:
    """The config of a training run.

    Raises:
        UsageError: a file is missing or is not YAML; a key is unknown, of a wrong type, out of range or missing.
    """
    return load_config(TrainConfig, path, overrides)


def load_prepare_config(path: str | Path, overrides: Sequence[str] = ()) -> Loaded[PrepareConfig]:
    """The config of a corpus' preparation; raises like `load_train_config`."""
    return load_config(PrepareConfig, path, overrides)


def load_config(root: type[T], path: str | Path, overrides: Sequence[str] = ()) -> Loaded[T]:
    """The config of either root; raises like `load_train_config`."""
    composer = _Composer(root)
    sources = []
    for source, document in read_layers(path):
        sources.append(source)
        composer.add_layer(document, source)
    for override in overrides:
        composer.add_override(override)
    return Loaded(config=composer.build(str(path)), origins=composer.origins, sources=tuple(sources))


def read_layers(path: str | Path) -> Iterator[tuple[str, Node]]:
    """The files that a config consists of and their mappings, in the order in which they are laid down.

    Raises:
        UsageError: a file cannot be read or is absurdly large, or the files' defaults form a cycle or too many layers.
    """
    for number, layer in enumerate(_read_layers(str(path), asked_by=None, above=()), start=1):
        if number > _MOST_LAYERS:
            raise UsageError(f"{path} and its defaults are more than {_MOST_LAYERS} files. Nothing was started.")
        yield layer


def _read_layers(path: str, *, asked_by: str | None, above: tuple[str, ...]) -> Iterator[tuple[str, Node]]:
    real = os.path.realpath(path)
    if real in above:
        raise UsageError(f"{path} is among its own defaults ({asked_by}). Nothing was started.")
    document = parse_yaml(_read_text(path, asked_by), path)
    if document is None:
        yield path, Node(line=1, entries={})
        return
    if document.entries is None:
        raise UsageError(f"{path}:{document.line}: a config is a mapping of sections. Nothing was started.")
    for line, name in _defaults(document, path):
        below = os.path.normpath(os.path.join(os.path.dirname(path), name))  # noqa: PTH118, PTH120  a path as it is shown
        yield from _read_layers(below, asked_by=f"{path}:{line}", above=(*above, real))
    yield path, document


def _defaults(document: Node, path: str) -> list[tuple[int, str]]:
    """(line, file name) of each entry of a file's `defaults:`."""
    line, node = (document.entries or {}).get("defaults", (1, Node(line=1, items=[])))
    if node.items is None or not all(isinstance(item.value, str) for item in node.items):
        raise UsageError(f"defaults is a list of files ({path}:{line}). Nothing was started.")
    return [(item.line, str(item.value)) for item in node.items]


def _read_text(path: str, asked_by: str | None) -> str:
    where = f" (named in {asked_by})" if asked_by else ""
    try:
        with Path(path).open("rb") as file:  # perhaps a pipe, perhaps a device that never ends
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise UsageError(f"{path}{where} is larger than {_MOST_BYTES} bytes, so no config. Nothing was started.")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}{where} is not UTF-8 text. Nothing was started.") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"cannot read the config {path}{where}: {reason}. Nothing was started.") from error


@dataclass(kw_only=True)
class _Given:
    """The value of a key after the layers so far."""

    value: Any
    origin: str


@dataclass
class _Composer:
    """Lays layers on top of one another."""

    root: type
    given: dict[str, _Given] = field(default_factory=dict)

    def add_layer(self, document: Node, source: str) -> None:
        """Lays the keys of one file over what is there; later layers win."""
        entries = {key: child for key, child in (document.entries or {}).items() if key != "defaults"}
        self._add_section("", Node(line=document.line, entries=entries), source)

    def add_override(self, override: str) -> None:
        """Lays one key.path=value over what is there."""
        name, sign, text = override.partition("=")
        if not sign or not name:
            what = "an argument that shows a credential" if carries_credential(override) else repr(override)
            raise UsageError(f"{what} is not an override; allowed: key.path=value. Nothing was started.")
        self._add(name, override_node(name, text, self.root), None, line=1)

    def _add_section(self, section: str, node: Node, source: str | None) -> None:
        if node.is_plain and node.value is None:  # a section whose lines are all comments
            return
        if node.entries is None:
            where = _where(source, node.line)
            below = [name for name in all_keys(self.root) if name.startswith(f"{section}.")]
            raise UsageError(
                f"{section} is a section, not a value ({where}). Nothing was started.",
                hint=f"its keys: {', '.join(below)}",
            )
        for key, (line, child) in node.entries.items():
            if "." in key:
                raise UsageError(
                    f"unknown key {key} ({_where(source, line)}). Nothing was started.",
                    hint="in a file keys are nested: one mapping a section, as `training:` with `steps: 20` below it",
                )
            self._add(f"{section}.{key}" if section else key, child, source, line=line)

    def _add(self, name: str, node: Node, source: str | None, *, line: int) -> None:
        keys = all_keys(self.root)
        if name in all_sections(self.root):
            self._add_section(name, node, source)
        elif name in keys and keys[name].base == "dict":
            self._add_mapping(keys[name], node, source, line=line)
        elif name in keys:
            self._set(name, convert(keys[name], node, _where(source, line)), source, line)
        elif (parent := _mapping_of(name, keys)) is not None:
            self._add_entry(parent, name, node, source, line=line)
        else:
            raise self._unknown(name, _where(source, line))

    def _add_mapping(self, key: Key, node: Node, source: str | None, *, line: int) -> None:
        convert(key, node, _where(source, line))
        for entry, (entry_line, child) in (node.entries or {}).items():
            self._add_entry(key, f"{key.name}.{entry}", child, source, line=entry_line)

    def _add_entry(self, key: Key, name: str, node: Node, source: str | None, *, line: int) -> None:
        """Sets an entry of a mapping; null takes one away that an earlier layer set."""
        where = _where(source, line)
        check_entry_name(key, name.removeprefix(f"{key.name}."), where)
        if node.is_plain and node.value is None:
            if name not in self.given:
                raise UsageError(f"{name} is null, but no earlier layer set it ({where}). Nothing was started.")
            del self.given[name]
            return
        self._set(name, convert(key, node, where, entry=name), source, line)

    def _set(self, name: str, value: Any, source: str | None, line: int) -> None:
        origin = OVERRIDE_ORIGIN if source is None else f"{source}:{line}"
        self.given[name] = _Given(value=value, origin=origin)

    def _unknown(self, name: str, where: str) -> UsageError:
        message = f"unknown key {name} ({where}). Nothing was started."
        for other, command in _COMMANDS.items():
            if other is not self.root and (name in all_keys(other) or name in all_sections(other)):
                return UsageError(message, hint=f"{name} belongs to a config of `{command}`")
        return UsageError(message, hint=f"did you mean {nearest(name, self.root)}?")

    @property
    def origins(self) -> dict[str, str]:
        """Who set each key: file:line, override or default."""
        origins: dict[str, str] = {}
        for name, key in all_keys(self.root).items():
            if key.base == "dict":
                entries = {entry: given.origin for entry, given in self.given.items() if entry.startswith(f"{name}.")}
                origins.update(entries or {name: DEFAULT_ORIGIN})
            else:
                origins[name] = self.given[name].origin if name in self.given else DEFAULT_ORIGIN
        return origins

    def build(self, path: str) -> Any:
        """The typed tree of the composed values."""
        values = {name: self._value(key) for name, key in all_keys(self.root).items()}
        missing = [key for name, key in all_keys(self.root).items() if values[name] is MISSING]
        if missing:
            listed = "; ".join(f"{key.name} ({key.setting.doc}; {key.allowed})" for key in missing)
            command = _COMMANDS[self.root]
            raise UsageError(
                f"{path} does not set {listed}. Nothing was started.",
                hint=f"set {missing[0].name} in {path} or in one of its defaults; `{command}` needs it",
            )
        return _build(self.root, "", values)

    def _value(self, key: Key) -> Any:
        if key.base != "dict":
            return self.given[key.name].value if key.name in self.given else key.default
        prefix = f"{key.name}."
        entries = {
            name.removeprefix(prefix): given.value for name, given in self.given.items() if name.startswith(prefix)
        }
        return entries or key.default


def _build(root: type, prefix: str, values: Mapping[str, Any]) -> Any:
    sections = all_sections(root)
    arguments: dict[str, Any] = {}
    for name in (part.name for part in dataclasses.fields(root)):
        below = sections.get(name)
        arguments[name] = values[prefix + name] if below is None else _build(below, f"{prefix}{name}.", values)
    return root(**arguments)


def _mapping_of(name: str, keys: Mapping[str, Key]) -> Key | None:
    return next((key for key in keys.values() if key.base == "dict" and name.startswith(f"{key.name}.")), None)


def _where(source: str | None, line: int) -> str:
    return "on the command line" if source is None else f"{source}:{line}"
