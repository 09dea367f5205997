"""Answers of the reader of checkpoints to every state that a crash may leave, after every operation of a program."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from megamask.checkpoint.integrity import verify_folder
from megamask.checkpoint.names import COMMIT_NAME, parse_folder_name
from megamask.checkpoint.reader import candidates
from megamask.checkpoint.retention import sweep
from megamask.errors import CheckpointIntegrityError
from megamask.runs.layout import CHECKPOINTS
from support.disk_model import ROOT, Disk, Op, Tree, build

COMMITTED = "committed "  # a mark: from here on the caller of save relies on the checkpoint of this name
NEXT_ATTEMPT = 9


def first_violation(ops: Sequence[Op], start: int, folders: set[int], *, keep_last: int, workspace: Path) -> str | None:
    """The first broken promise over all prefixes of the operations and all states after a crash there, or None.

    Promised is: each visible checkpoint verifies byte for byte; the newest `keep_last` that were reported as committed
    are visible; and the next attempt's sweep changes neither.

    Args:
        start: how many operations made the disk as it was before the program; no crash is tried among them.
    """
    disk = Disk()
    for folder in folders:
        disk.add_folder(folder)
    committed: list[str] = []
    judged: set[str] = set()
    for number, op in enumerate(ops, start=1):
        disk.apply(op)
        if op.kind == "mark" and op.where.startswith(COMMITTED):
            committed.append(op.where.removeprefix(COMMITTED))
        if number < start:
            continue
        needed = frozenset(committed[-keep_last:])
        for state in crash_states(disk):
            key = repr((_sorted(state), sorted(needed)))
            if key in judged:
                continue
            judged.add(key)
            if problem := _problem(state, needed, workspace):
                return f"after operation {number} ({op}): {problem}"
    return None


def crash_states(disk: Disk) -> Iterator[Tree]:
    """The states of a run directory's checkpoints after a crash.

    Choices of different folders do not depend on one another and readers judge each folder by itself, so each state of
    each folder is met once, not each combination of them. What lies beside an invisible COMMIT.json is not looked at.
    """
    [*roots] = disk.possible_targets(ROOT, CHECKPOINTS)
    for root in roots:
        if root is None:
            yield {}
            continue
        states = {name: list(_states_of(disk, root, name)) for name in disk.entries[root]}
        for number in range(max(map(len, states.values()), default=1)):
            chosen = {name: options[number % len(options)] for name, options in states.items()}
            yield {CHECKPOINTS: {name: value for name, value in chosen.items() if value is not None}}


def _states_of(disk: Disk, folder: int, name: str) -> Iterator[bytes | Tree | None]:
    for target in disk.possible_targets(folder, name):
        if target is None:
            yield None
        elif target in disk.folders:
            yield from disk.possible_trees(target, visible_by=COMMIT_NAME if parse_folder_name(name) else "")
        else:
            yield from disk.possible_contents(target)


def _problem(state: Tree, needed: frozenset[str], workspace: Path) -> str | None:
    shutil.rmtree(workspace, ignore_errors=True)
    workspace.mkdir()
    build(state, workspace)
    visible = {folder.name for folder in candidates(workspace)}
    if lost := sorted(needed - visible):
        return f"{lost[0]} was committed and is lost"
    if problem := _damage(workspace):
        return problem
    sweep(workspace, NEXT_ATTEMPT)
    if {folder.name for folder in candidates(workspace)} != visible:
        return "the next attempt's sweep removed a visible checkpoint"
    return _damage(workspace)


def _damage(run_dir: Path) -> str | None:
    for folder in candidates(run_dir):
        try:
            verify_folder(folder)
        except CheckpointIntegrityError as error:
            return f"{folder.name} is visible and damaged: {error.message.replace(str(run_dir), '')}"
    return None


def _sorted(tree: Tree) -> list[object]:
    return [(name, value if isinstance(value, bytes) else _sorted(value)) for name, value in sorted(tree.items())]
