"""A config from YAML layers and overrides, with the origin of every key.

A file's `defaults:` lists other files, relative to itself; they are merged depth first in that order, the file itself
over them, then the overrides `a.b=c`. OmegaConf merges: mappings merge, everything else is replaced. Every layer must
be right by itself: a mistake is an error even where a later layer hides it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from yaml.nodes import MappingNode, Node, SequenceNode

from megamask.config.keys import Key, all_keys, all_sections, find_key, nearest
from megamask.config.lines import entries_of, line_of, parse_yaml, value_of_node
from megamask.config.merge import Tree
from megamask.config.paths import check_references, expand_home
from megamask.config.schema.roots import PrepareConfig, TrainConfig
from megamask.config.secrets import carries_credential
from megamask.config.values import check_entry_name, convert, override_node
from megamask.errors import UsageError

T = TypeVar("T", TrainConfig, PrepareConfig)

DEFAULT_ORIGIN = "default"
OVERRIDE_ORIGIN = "override"
# Far beyond any config; a file without an end, or defaults that name each other twice, must end too.
_MAX_BYTES = 1 << 20
_MAX_LAYERS = 100
# Settings of older versions that stored configs still contain; none had an effect on results.
REMOVED_SETTINGS = frozenset({"training.head_capacity"})
_COMMANDS: dict[type, str] = {TrainConfig: "megamask train", PrepareConfig: "megamask prepare"}


@dataclass(frozen=True, kw_only=True)
class Loaded(Generic[T]):
    """A composed config and the origin of each value.

    Args:
        config: the frozen tree.
        origins: dotted key -> "file:line", "override" or "default"; entries of mappings have keys of their own.
        sources: the files that were read, in the order in which they were merged.
    """

    config: T
    origins: Mapping[str, str]
    sources: Sequence[str]


def load_train_config(path: str | Path, overrides: Sequence[str] = ()) -> Loaded[TrainConfig]:
    """Return the config of a training run.

    Raises:
        UsageError: a file is missing or is not YAML; a key is unknown, of a wrong type, out of range or missing.
    """
    return load_config(TrainConfig, path, overrides)


def load_stored_config(path: Path) -> TrainConfig:
    """Return the config that an attempt of a run stored, which may contain settings of an older version.

    Raises: as `load_train_config`.
    """
    return load_config(TrainConfig, path, ignored=REMOVED_SETTINGS).config


def load_prepare_config(path: str | Path, overrides: Sequence[str] = ()) -> Loaded[PrepareConfig]:
    """Return the config of a corpus' preparation; raises like `load_train_config`."""
    return load_config(PrepareConfig, path, overrides)


def load_config(
    root: type[T], path: str | Path, overrides: Sequence[str] = (), *, ignored: Set[str] = frozenset()
) -> Loaded[T]:
    """Return the config of either root, without the keys in `ignored`; raises like `load_train_config`."""
    sources = []
    composer = _Composer(root, ignored)
    for source, document in read_layers(path):
        sources.append(source)
        composer.add_layer(document, source)
    for override in overrides:
        composer.add_override(override)
    return Loaded(config=composer.build(str(path)), origins=composer.all_origins(), sources=tuple(sources))


def read_layers(path: str | Path) -> Iterator[tuple[str, Node | None]]:
    """Yield the files of a config and their mappings, in the order in which they are merged.

    Raises:
        UsageError: a file cannot be read or is absurdly large, or the files' defaults form a cycle or too many layers.
    """
    for number, layer in enumerate(_read_layers(find_config(str(path)), asked_by=None, above=()), start=1):
        if number > _MAX_LAYERS:
            raise UsageError(f"{path} and its defaults are more than {_MAX_LAYERS} files. Nothing was started.")
        yield layer


def find_config(path: str) -> str:
    """Return the path of a config; configs/... that is not here is the one that was installed with the package."""
    installed = Path(sys.prefix, "share", "megamask", path)
    is_shipped = path.startswith("configs/") and not os.path.lexists(path) and ".." not in path.split("/")
    return str(installed) if is_shipped and installed.is_file() else path


def _read_layers(path: str, *, asked_by: str | None, above: tuple[str, ...]) -> Iterator[tuple[str, Node | None]]:
    real = os.path.realpath(path)
    if real in above:
        raise UsageError(f"{path} is among its own defaults ({asked_by}). Nothing was started.")
    document = parse_yaml(_read_text(path, asked_by), path)
    if document is not None and not isinstance(document, MappingNode):
        raise UsageError(f"{path}:{line_of(document)}: a config is a mapping of sections. Nothing was started.")
    for line, name in _defaults(document, path):
        below = os.path.normpath(os.path.join(os.path.dirname(path), name))  # noqa: PTH118, PTH120  a path as it is shown
        yield from _read_layers(below, asked_by=f"{path}:{line}", above=(*above, real))
    yield path, document


def _defaults(document: Node | None, path: str) -> Iterator[tuple[int, str]]:
    """Yield (line, file name) of each entry of a file's `defaults:`."""
    entries = () if document is None else entries_of(document)
    for line, node in ((line, node) for key, line, node in entries if key == "defaults"):
        names = value_of_node(node)
        if not isinstance(node, SequenceNode) or not all(isinstance(name, str) for name in names):
            raise UsageError(f"defaults is a list of files ({path}:{line}). Nothing was started.")
        yield from zip(map(line_of, node.value), names, strict=True)


def _read_text(path: str, asked_by: str | None) -> str:
    where = f" (named in {asked_by})" if asked_by else ""
    try:
        with Path(path).open("rb") as file:  # perhaps a pipe, perhaps a device that never ends
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise UsageError(f"{path}{where} is larger than {_MAX_BYTES} bytes, so no config. Nothing was started.")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}{where} is not UTF-8 text. Nothing was started.") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"cannot read the config {path}{where}: {reason}. Nothing was started.") from error


class _Composer:
    """Checks each key of each layer, remembers its origin and merges the layer over those before it."""

    def __init__(self, root: type, ignored: Set[str]) -> None:
        self._root = root
        self._ignored = ignored
        self._tree = Tree(root)
        self._origins: dict[str, str] = {}

    def add_layer(self, document: Node | None, source: str) -> None:
        """Merge the keys of one file over the layers so far."""
        for key, line, node in () if document is None else entries_of(document):
            if key != "defaults":
                self._add_nested("", key, node, source, line)
        self._tree.merge()

    def add_override(self, override: str) -> None:
        """Merge one key.path=value over the layers so far."""
        name, sign, text = override.partition("=")
        if not sign or not name:
            what = "an argument that shows a credential" if carries_credential(override) else repr(override)
            raise UsageError(f"{what} is not an override; allowed: key.path=value. Nothing was started.")
        self._add(name, override_node(name, text, self._root), None, 1)
        self._tree.merge()

    def _add_section(self, section: str, node: Node, source: str | None) -> None:
        if not isinstance(node, MappingNode):
            if value_of_node(node) is None:  # a section whose lines are all comments
                return
            below = [name for name in all_keys(self._root) if name.startswith(f"{section}.")]
            raise UsageError(
                f"{section} is a section, not a value ({_where(source, line_of(node))}). Nothing was started.",
                hint=f"its keys: {', '.join(below)}",
            )
        for key, line, child in entries_of(node):
            self._add_nested(f"{section}.", key, child, source, line)

    def _add_nested(self, prefix: str, key: str, node: Node, source: str | None, line: int) -> None:
        if "." in key:
            raise UsageError(
                f"unknown key {key} ({_where(source, line)}). Nothing was started.",
                hint="in a file keys are nested: one mapping a section, as `training:` with `steps: 20` below it",
            )
        self._add(f"{prefix}{key}", node, source, line)

    def _add(self, name: str, node: Node, source: str | None, line: int) -> None:
        key = find_key(name, self._root)
        if name in all_sections(self._root):
            self._add_section(name, node, source)
        elif key is None and name in self._ignored:
            return
        elif key is None:
            raise self._unknown(name, _where(source, line))
        elif key.base != "dict":
            self._set(key, None, convert(key, node, _where(source, line)), source, line)
        elif name != key.name:
            self._add_entry(key, name.removeprefix(f"{key.name}."), node, source, line)
        else:
            convert(key, node, _where(source, line))
            for entry, entry_line, child in entries_of(node):
                self._add_entry(key, entry, child, source, entry_line)

    def _add_entry(self, key: Key, entry: str, node: Node, source: str | None, line: int) -> None:
        """Set an entry of a mapping; null removes one that an earlier layer set."""
        where, name = _where(source, line), f"{key.name}.{entry}"
        check_entry_name(key, entry, where)
        if value_of_node(node) is not None:
            self._set(key, entry, convert(key, node, where, entry=name), source, line)
        elif self._origins.pop(name, None) is None:
            raise UsageError(f"{name} is null, but no earlier layer set it ({where}). Nothing was started.")
        else:
            self._tree.remove(key, entry)

    def _set(self, key: Key, entry: str | None, value: Any, source: str | None, line: int) -> None:
        self._tree.add(key, entry, value)
        name = key.name if entry is None else f"{key.name}.{entry}"
        self._origins[name] = OVERRIDE_ORIGIN if source is None else f"{source}:{line}"

    def _unknown(self, name: str, where: str) -> UsageError:
        message = f"unknown key {name} ({where}). Nothing was started."
        for other, command in _COMMANDS.items():
            if other is not self._root and (name in all_keys(other) or name in all_sections(other)):
                return UsageError(message, hint=f"{name} belongs to a config of `{command}`")
        return UsageError(message, hint=f"did you mean {nearest(name, self._root)}?")

    def all_origins(self) -> dict[str, str]:
        """Return the origin of each key: file:line, override or default."""
        origins: dict[str, str] = {}
        for name, key in all_keys(self._root).items():
            entries = [entry for entry in self._origins if entry.startswith(f"{name}.")] if key.base == "dict" else []
            origins |= {entry: self._origins.get(entry, DEFAULT_ORIGIN) for entry in entries or [name]}
        return origins

    def build(self, path: str) -> Any:
        """Return the typed tree of the composed values, its paths resolved."""
        paths = self._tree.given_paths()
        for name, text in self._tree.path_texts():
            check_references(name, text, self._origin_of(name), paths)
        absent = self._tree.missing()
        if missing := [key for name, key in all_keys(self._root).items() if name in absent]:
            listed = "; ".join(f"{key.name} ({key.setting.doc}; {key.allowed})" for key in missing)
            raise UsageError(
                f"{path} does not set {listed}. Nothing was started.",
                hint=f"set {missing[0].name} in {path} or in one of its defaults; `{_COMMANDS[self._root]}` needs it",
            )
        return self._tree.build(lambda name, text: expand_home(name, text, self._origin_of(name)))

    def _origin_of(self, name: str) -> str:
        return self._origins.get(name, DEFAULT_ORIGIN)


def _where(source: str | None, line: int) -> str:
    return "on the command line" if source is None else f"{source}:{line}"
