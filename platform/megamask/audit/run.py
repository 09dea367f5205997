"""`megamask verify run`: everything that a run directory says, read again and held against everything else it says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megamask.audit.rules import rules_of
from megamask.audit.story import Finding, JournalAudit, newest_commit_missing
from megamask.checkpoint.commit import Commit
from megamask.checkpoint.contents import check_state, read_model, read_state
from megamask.checkpoint.integrity import verify_folder
from megamask.checkpoint.names import PIN_SUFFIX
from megamask.checkpoint.reader import candidates, has_commit
from megamask.config.identity import compare_identity
from megamask.config.load import load_train_config
from megamask.config.schema.roots import TrainConfig
from megamask.data.manifest import MANIFEST_NAME, Manifest
from megamask.errors import CheckpointIntegrityError, DataIntegrityError, ExitCode, UsageError
from megamask.runs.claims import claimed_attempts, is_live, read_claim
from megamask.runs.configs import attempt_configs
from megamask.runs.laws import LAWS
from megamask.runs.layout import CHECKPOINTS, checkpoints_folder, claim_path, config_path
from megamask.runs.rank_files import read_rank_failures
from megamask.runs.record import RunRecord, read_run
from megamask.runs.status import read_status
from megamask.storage.hashing import sha256_bytes
from megamask.tracking.journal.chain import overtaken, verify_chain
from megamask.tracking.journal.lines import journal_files, read_lines

_SHOWN_FINDINGS = 200


@dataclass
class _Report:
    """What was found so far; findings of a corpus have an exit code of their own."""

    findings: list[Finding] = field(default_factory=list)
    corpus_findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def find(self, file: str, problem: str, line: int = 0) -> None:
        self.findings.append(Finding(file=file, line=line, problem=problem))


def verify_run(run_dir: Path) -> dict[str, Any]:
    """Checks a run directory against itself, and its corpora where they are reachable.

    A run that is alive may be checked: a line that is being written is not damage.

    Returns:
        run_id, run_dir, is_live, checked (counts of what was read), notes, findings (file, line, problem),
        num_findings, ok and exit_code: 0; 65; or 64 when only a corpus does not match.

    Raises:
        UsageError: not a run directory, or one whose run.json lacks what a run is.
        CheckpointIntegrityError: run.json itself is damaged.
        StorageError: the storage does not answer.
    """
    record = read_run(run_dir)
    report = _Report()
    attempts = _attempts(run_dir)
    alive = bool(attempts) and is_live(run_dir, attempts[-1])
    configs = _check_attempts(run_dir, record, attempts, report)
    # the commits first: a journal that is read later has the lines that they name
    commits = _check_checkpoints(run_dir, record, report)
    audit = _check_journal(run_dir, record, commits, report, is_alive=alive)
    _check_commits_against(audit, commits, report, is_alive=alive)
    _check_what_is_gone(run_dir, audit, report)
    _check_end(run_dir, audit, report, is_alive=alive)
    num_corpora = _check_corpora(record, configs, report)
    findings = sorted([*report.findings, *report.corpus_findings])
    code = ExitCode.DONE
    if findings:
        code = ExitCode.CHECKPOINT_INTEGRITY if report.findings else ExitCode.DATA_INTEGRITY
    return {
        "run_id": record.run_id,
        "run_dir": str(run_dir),
        "is_live": alive,
        "checked": {
            "journal_lines": audit.num_lines,
            "steps": audit.num_steps,
            "repeated_steps": audit.num_repeated,
            "attempts": len(attempts),
            "checkpoints": len(commits),
            "checkpoint_bytes": sum(commit.num_bytes for commit in commits),
            "corpora": num_corpora,
        },
        "notes": report.notes,
        "findings": [vars(finding) for finding in findings[:_SHOWN_FINDINGS]],
        "num_findings": len(findings),
        "ok": not findings,
        "exit_code": int(code),
    }


def _attempts(run_dir: Path) -> list[int]:
    """Every attempt that left a claim, a journal file or a config."""
    return sorted(
        attempt_configs(run_dir).keys()
        | set(claimed_attempts(run_dir))
        | {file.attempt for file in journal_files(run_dir)}
    )


def _check_attempts(run_dir: Path, record: RunRecord, attempts: list[int], report: _Report) -> dict[int, TrainConfig]:
    """Each attempt's claim and config: there, readable, and of this very run."""
    journalled = {file.attempt for file in journal_files(run_dir)}
    configs: dict[int, TrainConfig] = {}
    if attempts and attempts != list(range(1, len(attempts) + 1)):
        report.find("attempts", f"the attempts are {_shown(attempts)}; numbers count from 1 without a gap")
    for number in attempts:
        claim, claim_file = read_claim(run_dir, number), claim_path(run_dir, number)
        name = str(claim_file.relative_to(run_dir))
        if claim is None or claim.get("attempt") != number:
            report.find(name, "it is missing, damaged, or the claim of another attempt")
        path = config_path(run_dir, number)
        if not path.exists():
            if number in journalled:
                report.find(f"config/{path.name}", f"it is missing, though attempt {number} has a journal")
            else:
                report.notes.append(f"attempt {number} ended before it wrote its config")
            continue
        try:
            config = load_train_config(path).config
            compare_identity(dict(record.content["identity"]), config)
        except UsageError as error:
            report.find(f"config/{path.name}", error.message)
            continue
        configs[number] = config
    return configs


def _check_checkpoints(run_dir: Path, record: RunRecord, report: _Report) -> list[Commit]:
    """Every visible checkpoint, byte for byte, oldest first; those that are whole."""
    whole = []
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
            ("laws", dict(commit.laws), dict(LAWS)),
            ("the tokenizer's digest", model.tokenizer_digest, record.content["tokenizer_digest"]),
        ):
            if found != expected:
                report.find(f"{name}/COMMIT.json", f"{what} is {found!r}; run.json says {expected!r}")
        whole.append(commit)
    return whole


def _check_journal(
    run_dir: Path, record: RunRecord, commits: list[Commit], report: _Report, *, is_alive: bool
) -> JournalAudit:
    """The chain of hashes, then every line; and of each commit the line that it names."""
    audit = JournalAudit(rules_of(record))
    named: dict[Any, list[Commit]] = {}
    for commit in commits:
        named.setdefault(str(commit.journal.get("seq")), []).append(commit)
    for file, number, attempt, data, line in _lines(run_dir):
        if line is None:
            continue
        story = audit.see(file, number, attempt, line)
        for commit in [found for found in named.get(str(line["seq"]), []) if _names(found, data)]:
            stands = {
                "step": story.last_step,
                "consumed_samples": story.consumed_samples,
                "consumed_tokens": story.consumed_tokens,
            }
            _compare_state(commit, stands, attempt, f"{file}, line {number}", report)
            named[str(line["seq"])].remove(commit)
    for commit in (commit for unseen in named.values() for commit in unseen):
        where, seq = f"checkpoints/{commit.folder.name}/COMMIT.json", commit.journal.get("seq")
        report.find(where, f"line {seq!r} of the journal, which it names by its sha256, is not in the journal")
    for damage in verify_chain(run_dir):
        if is_alive and damage.problem.startswith("torn") and _is_last(run_dir, damage.file):
            report.notes.append(f"{damage.file}, line {damage.line} is being written")
            continue
        report.find(f"journal/{damage.file}", damage.problem, damage.line)
    report.notes += [f"journal/{beside}" for beside in overtaken(run_dir)]
    report.findings += audit.findings
    return audit


def _names(commit: Commit, data: bytes) -> bool:
    return bool(commit.journal.get("sha256") == sha256_bytes(data))


def _lines(run_dir: Path) -> Iterator[tuple[str, int, int, bytes, Mapping[str, Any] | None]]:
    """(file, line number, attempt, bytes, record or None) of every line of the journal."""
    number, file = 0, None
    for line in read_lines(run_dir):
        number = number + 1 if line.file == file else 1
        file = line.file
        yield f"journal/{line.file.path.name}", number, line.file.attempt, line.data, line.record()


def _is_last(run_dir: Path, name: str) -> bool:
    return journal_files(run_dir)[-1].path.name == name


def _compare_state(commit: Commit, stands: Mapping[str, int | None], attempt: int, where: str, report: _Report) -> None:
    """A commit's own scalars against where its attempt stood at the line that it names."""
    name = f"checkpoints/{commit.folder.name}/COMMIT.json"
    if attempt != commit.attempt:
        report.find(name, f"it names a line of attempt {attempt} ({where})")
    for key, value in stands.items():
        if value is not None and commit.state.get(key) != value:
            report.find(name, f"{key} is {commit.state.get(key)!r}; the journal stands at {value} there ({where})")


def _check_commits_against(audit: JournalAudit, commits: list[Commit], report: _Report, *, is_alive: bool) -> None:
    """Each commit on the disk against the line that announced it, and its parent against all commits known."""
    steps = {told.record["digest"]: told.record["step"] for told in audit.commits.values()}
    steps |= {commit.digest: commit.step for commit in commits}
    for commit in commits:
        name = f"checkpoints/{commit.folder.name}/COMMIT.json"
        told = audit.commits.get(commit.folder.name)
        if told is None:
            may_come = is_alive and commit.attempt == max(audit.attempts, default=commit.attempt)
            why = "is not announced yet" if may_come else "was not announced: its attempt ended before that"
            report.notes.append(f"{commit.folder.name} is whole and {why}")
        else:
            found = {"digest": commit.digest, "parent": commit.parent, "bytes": commit.num_bytes, "step": commit.step}
            for key, value in found.items():
                if told.record.get(key) != value:
                    problem = f"{key} is {told.record.get(key)!r}; {commit.folder.name} has {value!r}"
                    report.find(told.file, problem, told.line)
        if commit.parent is not None and not steps.get(commit.parent, commit.step) < commit.step:
            report.find(name, "its parent, or a commit that is nowhere announced, is not of an earlier step")


def _check_what_is_gone(run_dir: Path, audit: JournalAudit, report: _Report) -> None:
    """A pin keeps its checkpoint for ever, and the newest one stays; a kill may lose the line of another's removal."""
    visible = {folder.name for folder in candidates(run_dir)}
    pins = checkpoints_folder(run_dir).glob(f"*{PIN_SUFFIX}")
    pinned = {path.name.removesuffix(PIN_SUFFIX) for path in pins}
    for name in sorted(pinned - visible):
        report.find(f"{CHECKPOINTS}/{name}{PIN_SUFFIX}", f"{name} is pinned, but there is no such checkpoint")
    if missing := newest_commit_missing(audit, visible):
        report.findings.append(missing)
    for name in sorted(audit.commits.keys() - visible - audit.pruned - pinned):
        if missing is None or not missing.problem.startswith(name):
            report.notes.append(f"{name} was committed and is gone, and no line tells that it was pruned")


def _check_end(run_dir: Path, audit: JournalAudit, report: _Report, *, is_alive: bool) -> None:
    """status.json, the last words of each attempt, and what nobody has ended."""
    for story in audit.attempts.values():
        if story.ended is None and not (is_alive and story.number == max(audit.attempts)):
            codes = [failure.exit_code for failure in read_rank_failures(run_dir, story.number).values()]
            how = "was superseded" if ExitCode.DO_NOT_REQUEUE in codes else "ended without a word"
            report.notes.append(f"attempt {story.number} {how} after step {story.last_step or 0}")
    try:
        status = read_status(run_dir)
    except UsageError as error:
        report.find("status.json", error.message)
        return
    if status is None:
        report.notes.append("status.json is missing or damaged; it is only a hint")
        return
    told = audit.attempts.get(status.attempt)
    if status.exit_code is None or told is None or told.ended is None:
        return
    for key, value in (("phase", status.phase), ("exit_code", status.exit_code), ("step", status.step)):
        if told.ended.get(key) != value:
            report.find("status.json", f"{key} is {value!r}; attempt {status.attempt} ended as {told.ended.get(key)!r}")


def _check_corpora(record: RunRecord, configs: Mapping[int, TrainConfig], report: _Report) -> int:
    """The corpora of the newest config that are reachable, by id; returns how many were."""
    if not configs:
        return 0
    reached = 0
    for name, folder in configs[max(configs)].data.corpora.items():
        where, expected = f"data.corpora.{name}", record.content["corpora"].get(name)
        if not (Path(folder) / MANIFEST_NAME).exists():
            report.notes.append(f"corpus {name} is not reachable at {folder}")
            continue
        reached += 1
        try:
            manifest = Manifest.load(folder)
        except (DataIntegrityError, UsageError) as error:
            report.corpus_findings.append(Finding(file=where, line=0, problem=error.message))
            continue
        if manifest.corpus_id != expected:
            problem = f"{folder} is corpus {manifest.corpus_id}; the run was started with {expected}"
            report.corpus_findings.append(Finding(file=where, line=0, problem=problem))
        elif manifest.tokenizer_digest != record.content["tokenizer_digest"]:
            problem = f"its tokenizer is {manifest.tokenizer_digest}; the run was started with another"
            report.corpus_findings.append(Finding(file=where, line=0, problem=problem))
    return reached


def _shown(numbers: list[int]) -> str:
    text = ", ".join(map(str, numbers[:20]))
    return text if len(numbers) <= 20 else f"{text}, ..."
