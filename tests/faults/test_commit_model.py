"""A model checker over the file operations of commits, of pruning and of the sweep, as the real code does them.

The operations are recorded from the product's own functions. For every prefix of them, and every loss of what was not
flushed by then (support/disk_model.py has what a crash may keep), the disk is rebuilt and read by the real reader.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from megamask.checkpoint.commit import begin
from megamask.checkpoint.retention import prune, sweep
from megamask.storage.durable import fsync_directory
from support.crash_states import COMMITTED, first_violation
from support.disk_model import ROOT, Disk, Op, replay
from support.disk_recorder import Recorder
from support.saving import save_once

KEEP_LAST = 2


@dataclass(frozen=True)
class Recording:
    """Record of a program: its operations, and how many of them made the disk it began on."""

    ops: list[Op]
    start: int
    folders: set[int]

    def violation(self, workspace: Path, ops: Sequence[Op] | None = None) -> str | None:
        given = self.ops if ops is None else ops
        return first_violation(given, self.start, self.folders, keep_last=KEEP_LAST, workspace=workspace)


def committing(run_dir: Path, recorder: Recorder, *, in_background: bool = False) -> None:
    """Four commits and what pruning then removes."""
    for step in (10, 20, 30, 40):
        commit = save_once(run_dir, step=step, attempt=1, in_background=in_background)
        recorder.mark(f"{COMMITTED}{commit.folder.name}")
        prune(run_dir, KEEP_LAST, run_id="r")


def taking_over(run_dir: Path, recorder: Recorder) -> None:
    """The second attempt's sweep and its first commit."""
    recorder.mark(f"{COMMITTED}step-00000010-a0001")
    recorder.mark(f"{COMMITTED}step-00000020-a0001")
    sweep(run_dir, 2)
    commit = save_once(run_dir, step=30, attempt=2)
    recorder.mark(f"{COMMITTED}{commit.folder.name}")


def record(run_dir: Path, program: Callable[[Path, Recorder], None]) -> Recording:
    recorder = Recorder(run_dir)
    with recorder.recording():
        program(run_dir, recorder)
    return Recording(recorder.ops, recorder.start, recorder.folders)


@pytest.fixture(scope="module")
def commits(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return record(tmp_path_factory.mktemp("commits"), committing)


@pytest.fixture(scope="module")
def takeover(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """Begins on two commits, a save that did not finish, and a removal that did not finish."""
    run_dir = tmp_path_factory.mktemp("takeover")
    for step in (10, 20):
        save_once(run_dir, step=step, attempt=1)
    (begin(run_dir, 25, 1) / "state-00000.safetensors").write_bytes(b"half")
    begin(run_dir, 5, 1).rename(run_dir / "checkpoints" / ".removing-step-00000005-a0001.0123abcd")
    return record(run_dir, taking_over)


@pytest.mark.promise(
    "a visible checkpoint is complete after a power cut behind any file operation, with any unflushed part lost"
)
def test_crash_after_any_operation_of_a_commit_or_prune_leaves_whole_what_is_visible(
    commits: Recording, tmp_path: Path
) -> None:
    assert commits.violation(tmp_path / "disk") is None


@pytest.mark.promise(
    "a visible checkpoint is complete after a power cut behind any file operation, with any unflushed part lost"
)
def test_crash_while_a_save_runs_beside_training_leaves_whole_what_is_visible(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    commits = record(tmp_path / "run", partial(committing, in_background=True))
    assert commits.violation(tmp_path / "disk") is None


@pytest.mark.promise(
    "a visible checkpoint is complete after a power cut behind any file operation, with any unflushed part lost"
)
def test_crash_after_any_operation_of_a_takeover_leaves_whole_what_is_visible(
    takeover: Recording, tmp_path: Path
) -> None:
    assert takeover.violation(tmp_path / "disk") is None


@pytest.mark.promise("the model checker finds each missing flush and each wrong order")
def test_checker_finds_the_loss_of_any_flush_that_the_protocol_needs(takeover: Recording, tmp_path: Path) -> None:
    """Left out one at a time; the entries of checkpoints/ are flushed more than once, `latest` is only a hint."""
    flushes = [i for i, op in enumerate(takeover.ops) if op.kind == "fsync" and i >= takeover.start]
    missed = [
        takeover.ops[i].where
        for i in flushes
        if takeover.violation(tmp_path / "disk", [*takeover.ops[:i], *takeover.ops[i + 1 :]]) is None
    ]
    needed = [i for i in flushes if takeover.ops[i].where.startswith("checkpoints/step-00000030-a0002")]
    assert missed == [takeover.ops[i].where for i in flushes if i not in needed]
    assert len(needed) >= 8  # four files and the index, the two folders, COMMIT.json, its name


def place(ops: Sequence[Op], kind: str, end: str) -> int:
    """Return the index of the last operation of a kind on a path."""
    return max(i for i, op in enumerate(ops) if op.kind == kind and op.where.endswith(end))


def no_flush_of_the_folder_of_checkpoints(ops: list[Op]) -> list[Op]:
    return [op for op in ops if not (op.kind == "fsync" and op.where == "checkpoints")]


def no_flush_of_the_run_directory(ops: list[Op]) -> list[Op]:
    return [ops[0], *(op for op in ops[1:] if not (op.kind == "fsync" and op.where == "."))]


def visible_before_its_files_are_flushed(ops: list[Op]) -> list[Op]:
    """COMMIT.json is linked as soon as it is written, and all is flushed afterwards."""
    linked, first = place(ops, "entry", "COMMIT.json"), place(ops, "fsync", "-a0001/state-00000.safetensors")
    temporary = [op for op in ops[first:linked] if ".COMMIT.json." in op.where]
    others = [op for op in ops[first:linked] if ".COMMIT.json." not in op.where]
    return [*ops[:first], *temporary, ops[linked], *others, *ops[linked + 1 :]]


def commit_document_written_in_place(ops: list[Op]) -> list[Op]:
    """COMMIT.json has its name from the start and is written and flushed under it."""
    linked = place(ops, "entry", "COMMIT.json")
    written = max(i for i, op in enumerate(ops[:linked]) if op.kind == "write" and ".COMMIT.json." in op.where)
    return [*ops[: written - 1], ops[linked], *ops[written:linked], *ops[linked + 1 :]]


def content_removed_before_its_commit(ops: list[Op]) -> list[Op]:
    gone = place(ops, "entry", "COMMIT.json (gone)")
    return [*ops[:gone], ops[gone + 2], ops[gone], ops[gone + 1], *ops[gone + 3 :]]


def content_removed_while_its_commit_may_come_back(ops: list[Op]) -> list[Op]:
    gone = place(ops, "entry", "COMMIT.json (gone)")
    return [*ops[: gone + 1], *ops[gone + 2 :]]


def old_commit_removed_before_the_new_one_is_durable(ops: list[Op]) -> list[Op]:
    linked = place(ops, "entry", "COMMIT.json")
    gone = place(ops, "entry", "COMMIT.json (gone)")
    return [*ops[:linked], ops[gone], ops[gone + 1], *ops[linked:gone], *ops[gone + 2 :]]


def one_commit_too_many_is_removed(ops: list[Op]) -> list[Op]:
    newer = place(ops, "entry", "step-00000030-a0001/COMMIT.json")
    [(folder, name, _)] = ops[newer].changes
    return [*ops, Op("entry", "one too many", changes=((folder, name, None),))]


BROKEN = [
    no_flush_of_the_folder_of_checkpoints,
    no_flush_of_the_run_directory,
    visible_before_its_files_are_flushed,
    commit_document_written_in_place,
    content_removed_before_its_commit,
    content_removed_while_its_commit_may_come_back,
    old_commit_removed_before_the_new_one_is_durable,
    one_commit_too_many_is_removed,
]


@pytest.mark.promise("the model checker finds each missing flush and each wrong order")
@pytest.mark.parametrize("break_protocol", BROKEN, ids=lambda function: function.__name__)
def test_checker_finds_a_broken_protocol(
    commits: Recording, tmp_path: Path, break_protocol: Callable[[list[Op]], list[Op]]
) -> None:
    broken = break_protocol(commits.ops)
    assert [str(op) for op in broken] != [str(op) for op in commits.ops]
    assert commits.violation(tmp_path / "disk", broken) is not None


def test_recorder_refuses_changes_that_it_did_not_see_one_by_one(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    with pytest.raises(AssertionError, match="not recorded one by one"), recorder.recording():
        subprocess.run(["touch", str(tmp_path / "one"), str(tmp_path / "two")], check=True)


def test_model_keeps_what_was_flushed_and_any_part_of_the_rest(tmp_path: Path) -> None:
    """Two files, one of them flushed, in a folder whose entries are not: each may be there, one of them torn."""
    recorder = Recorder(tmp_path)
    with recorder.recording():
        (tmp_path / "a").write_bytes(b"aaaa")
        (tmp_path / "b").write_bytes(b"bbbb")
        with (tmp_path / "a").open("rb") as file:
            os.fsync(file.fileno())
    disk = replay(recorder.ops, recorder.folders)
    states = {repr(sorted(tree.items())) for tree in disk.possible_trees(ROOT)}
    torn: list[bytes | None] = [b"", b"bbbb", b"bb", bytes(4), None]
    expected = [[("a", a), ("b", b)] for a in (b"aaaa", None) for b in torn]
    assert states == {repr([(name, value) for name, value in pairs if value is not None]) for pairs in expected}
    assert all({"a", "b"} == tree.keys() for tree in flushed(recorder, tmp_path).possible_trees(ROOT))


def flushed(recorder: Recorder, folder: Path) -> Disk:
    with recorder.recording():
        fsync_directory(folder)
    return replay(recorder.ops, recorder.folders)
