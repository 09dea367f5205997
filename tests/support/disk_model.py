"""Model of a disk after a power cut: the operations of a program, and every state that they allow.

The model is what POSIX promises of a file system, and nothing that a particular one adds:

- a crash keeps everything that was flushed;
- `fsync` of a file makes its content durable, not its name; `fsync` of a directory makes its entries durable, not
  the content of the files they name, nor the directory's own entry in its parent;
- of each entry that was created, replaced, renamed or removed since its directory's last flush, a crash keeps any of
  the states that it went through, with any part of the others entry: nothing is ordered;
- of the content of a file that was written since its own last flush, a crash keeps any of the states that were
  observed, a part of the last one, or zeros of its length, with any part of the others file;
- link, rename and unlink are each one change of one entry (a rename: of two, which are kept or lost apart. Real file
  systems are kinder).

So a state after a crash is one choice for each entry and each file, all choices independent of one another.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = 0
Tree = dict[str, "bytes | Tree"]  # what a folder holds: content of a file, or a folder


@dataclass(frozen=True)
class Op:
    """One change that a program made, or one flush, or a mark that the test set.

    Args:
        kind: "entry" (a name of a directory now means `target`, None for nothing), "write" (a file has this content),
            "fsync", or "mark".
        node: the directory or file.
        changes: of an "entry": (directory, name, target) for each entry that changed at once.
        where: the path at that time, for messages; of a "mark" its text.
    """

    kind: str
    where: str
    node: int = ROOT
    changes: tuple[tuple[int, str, int | None], ...] = ()
    content: bytes | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.where}"


@dataclass
class Disk:
    """All that may be on the disk: for each entry and each file the states since its last flush, the present last."""

    entries: dict[int, dict[str, list[int | None]]] = field(default_factory=lambda: {ROOT: {}})
    contents: dict[int, list[bytes]] = field(default_factory=dict)
    folders: set[int] = field(default_factory=lambda: {ROOT})

    def apply(self, op: Op) -> None:
        """Does one operation."""
        if op.kind == "entry":
            for folder, name, target in op.changes:
                states = self.entries.setdefault(folder, {}).setdefault(name, [None])
                states.append(target)
        elif op.kind == "write":
            assert op.content is not None
            self.contents.setdefault(op.node, [b""]).append(op.content)
        elif op.kind == "fsync" and op.node in self.folders:
            self.entries[op.node] = {
                name: [states[-1]] for name, states in self.entries.get(op.node, {}).items() if states[-1] is not None
            }
        elif op.kind == "fsync":
            self.contents[op.node] = [self.contents.get(op.node, [b""])[-1]]

    def add_folder(self, node: int) -> None:
        """Record that a node is a directory."""
        self.folders.add(node)
        self.entries.setdefault(node, {})

    def possible_contents(self, node: int) -> list[bytes]:
        """Possible contents of a file after a crash."""
        states = self.contents.get(node, [b""])
        if len(states) == 1:
            return states
        last = states[-1]
        return list(dict.fromkeys([*states, last[: len(last) // 2], bytes(len(last))]))

    def possible_targets(self, folder: int, name: str) -> list[int | None]:
        """Possible meanings of a name in a directory after a crash."""
        return list(dict.fromkeys(self.entries[folder].get(name, [None])))

    def possible_trees(self, folder: int, *, visible_by: str | None = None) -> Iterator[Tree]:
        """Every state of a directory and all below it.

        Args:
            visible_by: a name without which no reader looks at the rest of the directory: states without it are one.
        """
        choices: list[list[tuple[str, bytes | Tree | None]]] = []
        for name in self.entries[folder]:
            values: list[bytes | Tree | None] = []
            for target in self.possible_targets(folder, name):
                if target is None:
                    values.append(None)
                elif target in self.folders:
                    values.extend(self.possible_trees(target))
                else:
                    values.extend(self.possible_contents(target))
            if name == visible_by and None in values:
                yield {}
            if name == visible_by:
                values = [value for value in values if value is not None]
            choices.append([(name, value) for value in values])
        if visible_by is not None and visible_by not in self.entries[folder]:
            yield {}
            return
        for chosen in itertools.product(*choices):
            yield {name: value for name, value in chosen if value is not None}


def replay(ops: Sequence[Op], folders: set[int]) -> Disk:
    """The disk after these operations."""
    disk = Disk()
    for node in folders:
        disk.add_folder(node)
    for op in ops:
        disk.apply(op)
    return disk


def build(tree: Tree, folder: Path) -> None:
    """Writes a state into an empty folder of the real disk."""
    for name, value in tree.items():
        if isinstance(value, bytes):
            (folder / name).write_bytes(value)
        else:
            (folder / name).mkdir()
            build(value, folder / name)
