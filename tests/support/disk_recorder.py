"""Writes down what a program does to a folder, operation by operation, and checks that nothing was missed.

The functions of `os` and `open` that change a file system are wrapped; after each one the real folder is compared with
what is known of it. Whatever wrote a file, and however, its new content is seen before the next operation; and a
change of names that no wrapped function made is an error of the recording, not a gap in it.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from support.disk_model import ROOT, Op

_CHANGING = ("mkdir", "rmdir", "unlink", "remove", "link", "rename", "replace", "symlink", "open", "truncate")
_scandir, _real_open = os.scandir, os.open


class Recorder:
    """The operations below one folder, `root`, whose present content counts as durable."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ops: list[Op] = []
        self.folders: set[int] = {ROOT}
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._nodes: dict[int, int] = {root.stat().st_ino: ROOT}  # inode -> node
        self._names: dict[tuple[int, str], int] = {}  # (directory, name) -> node
        self._paths: dict[int, str] = {ROOT: "."}
        self._contents: dict[int, bytes] = {}
        self._observe(is_first=True)
        self.ops += [Op("fsync", path, node) for node, path in sorted(self._paths.items())]
        self.start = len(self.ops)

    def mark(self, text: str) -> None:
        """Sets a mark between two operations."""
        with self._lock:
            self._observe()
            self.ops.append(Op("mark", text))

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Records what this process does, in any of its threads."""
        with contextlib.ExitStack() as stack:
            for name in _CHANGING:
                stack.enter_context(mock.patch.object(os, name, self._observed(getattr(os, name))))
            stack.enter_context(mock.patch.object(os, "fsync", self._observed_fsync(os.fsync)))
            stack.enter_context(mock.patch.object(io, "open", self._observed(io.open)))
            stack.enter_context(mock.patch.object(builtins, "open", self._observed(builtins.open)))
            yield
            self._observe()

    def _observed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def observed(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                self._observe()
                try:
                    return function(*arguments, **options)
                finally:
                    self._observe()

        return observed

    def _observed_fsync(self, function: Callable[[int], None]) -> Callable[[int], None]:
        def fsync(descriptor: int) -> None:
            with self._lock:
                self._observe()
                function(descriptor)
                node = self._nodes.get(os.fstat(descriptor).st_ino)
                if node is not None:
                    self.ops.append(Op("fsync", self._paths[node], node))

        return fsync

    def _observe(self, *, is_first: bool = False) -> None:
        """Appends what has changed since the last look: at most one change of names, and any content."""
        names: dict[tuple[int, str], int] = {}
        paths, contents, nodes = {ROOT: "."}, {}, {self.root.stat().st_ino: ROOT}
        self._walk(self.root, ROOT, names, paths, contents, nodes)
        changed = [key for key in {**self._names, **names} if self._names.get(key) != names.get(key)]
        if len(changed) > 1 and not is_first and not self._is_rename(changed, names):
            raise AssertionError(f"changes that were not recorded one by one: {[name for _, name in changed]}")
        if changed:
            where = " -> ".join(f"{self._path_of(key, paths)}{'' if key in names else ' (gone)'}" for key in changed)
            steps = [changed] if not is_first else [[key] for key in changed]
            for step in steps:
                changes = tuple((folder, name, names.get((folder, name))) for folder, name in step)
                self.ops.append(Op("entry", where if not is_first else str(step), changes=changes))
        for node, content in contents.items():
            if self._contents.get(node, b"") != content:
                self.ops.append(Op("write", paths[node], node, content=content))
        self._names, self._contents, self._nodes = names, contents, nodes
        self._paths |= paths

    def _is_rename(self, changed: list[tuple[int, str]], names: dict[tuple[int, str], int]) -> bool:
        gone = [self._names[key] for key in changed if key not in names]
        new = [names[key] for key in changed if key in names]
        return len(gone) == len(new) == 1 and gone == new

    def _path_of(self, key: tuple[int, str], paths: dict[int, str]) -> str:
        return f"{paths.get(key[0], self._paths.get(key[0]))}/{key[1]}"

    def _walk(
        self,
        folder: Path,
        node: int,
        names: dict[tuple[int, str], int],
        paths: dict[int, str],
        contents: dict[int, bytes],
        nodes: dict[int, int],
    ) -> None:
        with _scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
        for entry in listed:
            status = entry.stat(follow_symlinks=False)
            number = nodes.get(status.st_ino)
            if number is None:
                number = self._nodes.get(status.st_ino)
                if number is None:
                    number = next(self._numbers)
            nodes[status.st_ino] = number
            names[node, entry.name] = number
            paths[number] = f"{paths[node]}/{entry.name}".removeprefix("./")
            if entry.is_dir(follow_symlinks=False):
                self.folders.add(number)
                self._walk(Path(entry.path), number, names, paths, contents, nodes)
            else:
                contents[number] = _content(entry.path)


def _content(path: str) -> bytes:
    descriptor = _real_open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        return b"".join(iter(lambda: os.read(descriptor, 1 << 20), b""))
    finally:
        os.close(descriptor)
