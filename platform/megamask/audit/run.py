"""Every record of a run directory, read again and compared with the others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megamask.audit.checkpoints import (
    check_checkpoints,
    check_commits_against,
    check_what_is_gone,
    compare_state,
    names_line,
)
from megamask.audit.corpora import check_corpora, check_data, corpus_folders
from megamask.audit.report import Report
from megamask.audit.rules import rules_of
from megamask.audit.skips import check_recorded, check_rewinds
from megamask.audit.story import AttemptStory, JournalAudit, Rules
from megamask.checkpoint.commit import Commit
from megamask.config.identity import compare_identity
from megamask.config.load import load_stored_config
from megamask.config.schema.roots import TrainConfig
from megamask.errors import ExitCode, UsageError
from megamask.runs.claims import claimed_attempts, is_live, read_claim
from megamask.runs.configs import attempt_configs
from megamask.runs.layout import claim_path, config_path
from megamask.runs.rank_files import read_rank_failures
from megamask.runs.record import RunRecord, read_run
from megamask.runs.status import read_status
from megamask.storage.hashing import sha256_bytes
from megamask.tracking.journal.chain import overtaken, verify_chain
from megamask.tracking.journal.lines import journal_files, read_lines

_SHOWN_FINDINGS = 200
_STATUS = "status.json"
# Ends that the attempt itself writes, the journal first.
_JOURNALLED_ENDS = frozenset({ExitCode.DONE, ExitCode.PREEMPTED, ExitCode.DO_NOT_REQUEUE})


@dataclass(frozen=True, kw_only=True)
class AuditRequest:
    """Checks beyond the run directory itself.

    Args:
        corpora: folder by name, for corpora that have moved since the journal recorded them.
        head: (seq, sha256) of a line that was written down earlier, or None.
        checks_data: read the corpora and recompute every content digest.
        is_in_mlflow: the run was compared with MLflow as well, which a rewrite here does not reach.
    """

    corpora: Mapping[str, str] = field(default_factory=dict)
    head: tuple[int, str] | None = None
    checks_data: bool = False
    is_in_mlflow: bool = False


def verify_run(run_dir: Path, request: AuditRequest | None = None, report: Report | None = None) -> dict[str, Any]:
    """Compare the records of a run directory with each other, and its corpora where they are reachable.

    A run that is alive may be checked: a line that is being written is not damage.

    Args:
        report: with the findings of further checks; they are part of the answer.

    Returns:
        run_id, run_dir, is_live, checked (counts of what was read), head (seq and sha256 of the journal's last line),
        notes, covered, not_covered, findings (file, line, problem), num_findings, ok and exit_code: 0; 65; or 64 when
        only a corpus does not match.

    Raises:
        UsageError: not a run directory, or one whose run.json lacks what identifies a run.
        CheckpointIntegrityError: run.json itself is damaged.
        StorageError: the storage does not answer.
    """
    request, report = request or AuditRequest(), report or Report()
    record = read_run(run_dir)
    attempts = _attempts(run_dir)
    alive = bool(attempts) and is_live(run_dir, attempts[-1])
    configs = _check_attempts(run_dir, record, attempts, report)
    # the commits first: a journal that is read later has the lines that they name
    rewinds = check_rewinds(record, report)
    commits = check_checkpoints(run_dir, record, report, rewinds)
    rules = rules_of(record, configs, rewinds)
    audit = _check_journal(run_dir, rules, commits, report, is_alive=alive)
    check_recorded(audit, report, is_alive=alive)
    check_commits_against(audit, commits, report, is_alive=alive)
    check_what_is_gone(run_dir, audit, report)
    _check_end(run_dir, audit, configs, report, is_alive=alive)
    heads = _heads(run_dir)
    head = _check_head(heads, request, report)
    _check_last_line(run_dir, heads, report)
    newest = configs[max(configs)] if configs else None
    report.covered += ["run.json", "attempts", "journal", "checkpoints", "status.json"]
    corpora = check_corpora(record, corpus_folders(run_dir, newest, request.corpora), report)
    if request.checks_data:
        check_data(run_dir, corpora, report)
    else:
        report.not_covered.append("the corpora's shards (--data)")
    report.not_covered.append("losses and gradient norms of the steps (nothing computes them again)")
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
            "corpora": len(corpora),
        },
        "head": None if head is None else {"seq": head[0], "sha256": head[1]},
        **_verdict(report),
    }


def _verdict(report: Report) -> dict[str, Any]:
    findings = sorted([*report.findings, *report.corpus_findings])
    code = ExitCode.DONE
    if findings:
        code = ExitCode.CHECKPOINT_INTEGRITY if report.findings else ExitCode.DATA_INTEGRITY
    return {
        "notes": report.notes,
        "covered": report.covered,
        "not_covered": report.not_covered,
        "findings": [vars(finding) for finding in findings[:_SHOWN_FINDINGS]],
        "num_findings": len(findings),
        "ok": not findings,
        "exit_code": int(code),
    }


def _heads(run_dir: Path) -> list[tuple[int, str]]:
    """Return (seq, sha256) of each line that can be read, in order."""
    return [
        (int(record["seq"]), sha256_bytes(line.data))
        for line in read_lines(run_dir)
        if (record := line.record()) is not None
    ]


def _check_head(heads: list[tuple[int, str]], request: AuditRequest, report: Report) -> tuple[int, str] | None:
    """Return (seq, sha256) of the last line; find an expected line that the journal does not have."""
    head = heads[-1] if heads else None
    if request.head is not None and request.head not in heads:
        seq, digest = request.head
        report.find("journal", f"no line {seq} has the sha256 {digest} that was expected (--expect-head)")
    if request.head is None and not request.is_in_mlflow:
        report.not_covered.append("a rewrite of everything at once (--expect-head N:SHA, --against-mlflow)")
    return head


def _attempts(run_dir: Path) -> list[int]:
    """Every attempt that left a claim, a journal file or a config."""
    return sorted(
        attempt_configs(run_dir).keys()
        | set(claimed_attempts(run_dir))
        | {file.attempt for file in journal_files(run_dir)}
    )


def _check_attempts(run_dir: Path, record: RunRecord, attempts: list[int], report: Report) -> dict[int, TrainConfig]:
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
            config = load_stored_config(path)
            compare_identity(dict(record.content["identity"]), config)
        except UsageError as error:
            report.find(f"config/{path.name}", error.message)
            continue
        configs[number] = config
    return configs


def _check_journal(
    run_dir: Path,
    rules: Rules,
    commits: list[Commit],
    report: Report,
    *,
    is_alive: bool,
) -> JournalAudit:
    """The chain of hashes, then every line; and of each commit the line that it names."""
    audit = JournalAudit(rules)
    named: dict[Any, list[Commit]] = {}
    for commit in commits:
        named.setdefault(str(commit.journal.get("seq")), []).append(commit)
    for file, number, attempt, data, line in _lines(run_dir):
        if line is None:
            continue
        story = audit.see(file, number, attempt, line)
        for commit in [found for found in named.get(str(line["seq"]), []) if names_line(found, data)]:
            position = {
                "step": story.last_step,
                "consumed_samples": story.consumed_samples,
                "consumed_tokens": story.consumed_tokens,
            }
            compare_state(commit, position, attempt, f"{file}, line {number}", report)
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


def _lines(run_dir: Path) -> Iterator[tuple[str, int, int, bytes, Mapping[str, Any] | None]]:
    """(file, line number, attempt, bytes, record or None) of every line of the journal."""
    number, file = 0, None
    for line in read_lines(run_dir):
        number = number + 1 if line.file == file else 1
        file = line.file
        yield f"journal/{line.file.path.name}", number, line.file.attempt, line.data, line.record()


def _is_last(run_dir: Path, name: str) -> bool:
    return journal_files(run_dir)[-1].path.name == name


def _check_end(
    run_dir: Path, audit: JournalAudit, configs: Mapping[int, TrainConfig], report: Report, *, is_alive: bool
) -> None:
    """Compare status.json and the configs with the end of each attempt; note attempts without an end."""
    for story in audit.attempts.values():
        if story.ended is None and not (is_alive and story.number == max(audit.attempts)):
            codes = [failure.exit_code for failure in read_rank_failures(run_dir, story.number).values()]
            how = "was superseded" if ExitCode.DO_NOT_REQUEUE in codes else "ended without a last line"
            report.notes.append(f"attempt {story.number} {how} after step {story.last_step or 0}")
        _check_steps(story, configs.get(story.number), report)
    try:
        status = read_status(run_dir)
    except UsageError as error:
        report.find(_STATUS, error.message)
        return
    if status is None:
        report.notes.append("status.json is missing or damaged; it is only a hint")
        return
    named = audit.attempts.get(status.attempt)
    # an end that a rank recorded by itself, as one that a signal met before training, has no line
    is_recorded = status.exit_code in {
        found.exit_code for found in read_rank_failures(run_dir, status.attempt).values()
    }
    if named is None:
        if status.step is not None or (status.exit_code in _JOURNALLED_ENDS and not is_recorded):
            report.find(_STATUS, f"it names attempt {status.attempt}, which the journal does not have")
        return
    if status.exit_code is None or is_alive:
        return
    if named.ended is None:
        # a crash is written by the launcher, and has no line
        if status.exit_code in _JOURNALLED_ENDS and not is_recorded:
            problem = f"attempt {status.attempt} ended with {status.exit_code}, but the journal has no line of its end"
            report.find(_STATUS, problem)
        return
    for key in ("phase", "exit_code", "step"):
        value, ended = getattr(status, key), getattr(named.ended, key)
        if ended != value:
            problem = f"{key} is {value!r}; attempt {status.attempt} ended as {ended!r}"
            report.find(_STATUS, problem)
    if status.phase == "done" and not named.is_completed:
        report.find(_STATUS, "the run is done, but the journal has no run_completed line")


def _check_last_line(run_dir: Path, heads: list[tuple[int, str]], report: Report) -> None:
    """Find a journal that lacks the line with which an attempt ended, by status.json: a cut leaves a valid chain."""
    with contextlib.suppress(UsageError):
        status = read_status(run_dir)
        if status is None or status.journal is None or tuple(status.journal) in heads:
            return
        report.find(_STATUS, f"attempt {status.attempt} ended with line {status.journal[0]}, which the journal lacks")


def _check_steps(story: AttemptStory, config: TrainConfig | None, report: Report) -> None:
    """Compare the last step of an attempt with training.steps of its config."""
    if config is None or story.last_step is None:
        return
    steps, name = config.training.steps, f"config/{config_path(Path(), story.number).name}"
    if story.last_step > steps or (story.is_completed and story.last_step != steps):
        report.find(name, f"training.steps is {steps}; attempt {story.number} ended at step {story.last_step}")


def _shown(numbers: list[int]) -> str:
    text = ", ".join(map(str, numbers[:20]))
    return text if len(numbers) <= 20 else f"{text}, ..."
