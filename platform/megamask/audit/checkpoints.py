"""Checkpoints of a run: their bytes, and their agreement with run.json and the journal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megamask.audit.report import Report
from megamask.audit.story import JournalAudit, newest_commit_missing
from megamask.checkpoint.commit import Commit
from megamask.checkpoint.contents import check_state, read_model, read_state
from megamask.checkpoint.integrity import verify_folder
from megamask.checkpoint.names import PIN_SUFFIX
from megamask.checkpoint.reader import candidates, has_commit
from megamask.errors import CheckpointIntegrityError, UsageError
from megamask.runs.laws import LAWS, SKIPPING_LAWS
from megamask.runs.layout import CHECKPOINTS, checkpoints_folder
from megamask.runs.record import RunRecord
from megamask.runs.skips import Rewind, rewinds_before
from megamask.storage.hashing import sha256_bytes
from megamask.training.announcing import commit_record


def check_checkpoints(run_dir: Path, record: RunRecord, report: Report, rewinds: Sequence[Rewind] = ()) -> list[Commit]:
    """Read every visible checkpoint byte for byte; return the intact ones, oldest first."""
    intact = []
    for folder in reversed(candidates(run_dir)):
        name = f"checkpoints/{folder.name}"
        try:
            commit = verify_folder(folder)
            check_state(commit, read_state(folder))
            model = read_model(folder)
        except (CheckpointIntegrityError, UsageError) as error:
            if has_commit(folder):
                report.find(name, error.message)
            else:
                report.notes.append(f"{folder.name} was pruned meanwhile")
            continue
        for what, found, expected in (
            ("run_id", commit.run_id, record.run_id),
            ("corpora", dict(commit.corpora), dict(record.content["corpora"])),
            ("laws", dict(commit.laws), SKIPPING_LAWS if rewinds_before(rewinds, commit.attempt) else LAWS),
            ("the tokenizer's digest", model.tokenizer_digest, record.content["tokenizer_digest"]),
            ("run.seed", commit.state.get("seed"), str(record.content["identity"].get("run.seed"))),
            ("the sha256 of run.json", commit.run_sha256 or record.sha256, record.sha256),
        ):
            if found != expected:
                report.find(f"{name}/COMMIT.json", f"{what} is {found!r}; run.json has {expected!r}")
        intact.append(commit)
    return intact


def compare_state(commit: Commit, position: Mapping[str, int | None], attempt: int, where: str, report: Report) -> None:
    """Compare a commit's own scalars with the state of its attempt at the line that it names."""
    name = f"checkpoints/{commit.folder.name}/COMMIT.json"
    if attempt != commit.attempt:
        report.find(name, f"it names a line of attempt {attempt} ({where})")
    for key, value in position.items():
        if value is not None and commit.state.get(key) != value:
            report.find(name, f"{key} is {commit.state.get(key)!r}; the journal is at {value} there ({where})")


def names_line(commit: Commit, data: bytes) -> bool:
    """Return whether a commit names this line of the journal by its sha256."""
    return bool(commit.journal.get("sha256") == sha256_bytes(data))


def check_commits_against(audit: JournalAudit, commits: list[Commit], report: Report, *, is_alive: bool) -> None:
    """Compare each commit on the disk with its line and evaluation, and its parent with all commits known."""
    steps = {line.record.digest: line.record.step for line in audit.commits.values()}
    steps |= {commit.digest: commit.step for commit in commits}
    for commit in commits:
        name = f"checkpoints/{commit.folder.name}/COMMIT.json"
        line = audit.commits.get(commit.folder.name)
        if line is None:
            may_come = is_alive and commit.attempt == max(audit.attempts, default=commit.attempt)
            why = "is not announced yet" if may_come else "was not announced: its attempt ended before that"
            report.notes.append(f"{commit.folder.name} is intact and {why}")
        else:
            expected = commit_record(commit, stall_s=None, save_s=None)
            for key in ("digest", "parent", "bytes", "step"):
                found, value = getattr(line.record, key), getattr(expected, key)
                if found != value:
                    problem = f"{key} is {found!r}; {commit.folder.name} has {value!r}"
                    report.find(line.file, problem, line.line)
        _check_evaluation(audit, commit, report, name)
        if commit.parent is not None and not steps.get(commit.parent, commit.step) < commit.step:
            report.find(name, "its parent, or a commit that is nowhere announced, is not of an earlier step")


def check_what_is_gone(run_dir: Path, audit: JournalAudit, report: Report) -> None:
    """Find pinned checkpoints and the newest commit if they are missing; a kill may lose the line of a removal."""
    visible = {folder.name for folder in candidates(run_dir)}
    pins = checkpoints_folder(run_dir).glob(f"*{PIN_SUFFIX}")
    pinned = {path.name.removesuffix(PIN_SUFFIX) for path in pins}
    for name in sorted(pinned - visible):
        report.find(f"{CHECKPOINTS}/{name}{PIN_SUFFIX}", f"{name} is pinned, but it does not exist")
    if missing := newest_commit_missing(audit, visible):
        report.findings.append(missing)
    for name in sorted(audit.commits.keys() - visible - audit.pruned - pinned):
        if missing is None or not missing.problem.startswith(name):
            report.notes.append(f"{name} was committed and is gone, and no line records that it was pruned")


def _check_evaluation(audit: JournalAudit, commit: Commit, report: Report, name: str) -> None:
    story = audit.attempts.get(commit.attempt)
    measured = None if story is None else story.evaluations.get(commit.step)
    if commit.evaluation is None:
        if measured is not None:
            report.find(name, f"it names no bound; the evaluation line of step {commit.step} has {measured}")
        return
    found = {key: float(value) for key, value in commit.evaluation.items()}
    if measured is None or any(str(found.get(key)) != str(value) for key, value in measured.items()):
        report.find(name, f"evaluation is {found}; the evaluation line of step {commit.step} has {measured}")
