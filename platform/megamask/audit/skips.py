"""Comparison of skips.json with the journal: every rewind is in both."""

from __future__ import annotations

from megamask.audit.report import Report
from megamask.audit.story import JournalAudit
from megamask.checkpoint.names import parse_folder_name
from megamask.errors import CheckpointIntegrityError, UsageError
from megamask.runs.layout import skips_path
from megamask.runs.record import RunRecord
from megamask.runs.skips import Rewind, read_rewinds


def check_rewinds(record: RunRecord, report: Report) -> list[Rewind]:
    """Return the rewinds of a run; a damaged document is a finding and counts as none."""
    path = skips_path(record.path.parent)
    try:
        rewinds = read_rewinds(path.parent)
    except (CheckpointIntegrityError, UsageError) as error:
        report.find(path.name, error.message)
        return []
    if rewinds:
        report.covered.append(path.name)
    return rewinds


def check_recorded(audit: JournalAudit, report: Report, *, is_alive: bool) -> None:
    """Compare the document with the journal, after all its lines; withdrawn checkpoints need not be there.

    A process that is killed between the document and its line leaves the line to the attempt that resumes.
    """
    rewinds = audit.rules.rewinds
    for rewind in rewinds:
        story = audit.attempts.get(rewind.attempt)
        if rewind.attempt in audit.recorded_rewinds:
            continue
        if story is not None and story.ended is None and rewind.attempt == max(audit.attempts):
            if not is_alive:
                report.notes.append(f"attempt {rewind.attempt} ended before it journalled its rewind of skips.json")
            continue
        report.find("skips.json", f"no line of the journal names the rewind of attempt {rewind.attempt}")
    for name in audit.commits:
        step, attempt = parse_folder_name(name) or (0, 0)
        if any(rewind.withdraws(step=step, attempt=attempt) for rewind in rewinds):
            audit.pruned.add(name)
