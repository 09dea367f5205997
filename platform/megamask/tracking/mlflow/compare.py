"""Contradictions between a run's journal and its run in MLflow; nothing is written.

A value that MLflow does not have yet is not a contradiction: `megamask sync` sends it. A repeated step may have the
value of any attempt.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megamask.tracking.journal.lines import Record, read_journal, read_lines
from megamask.tracking.mlflow.client import MLflowRun, text_of
from megamask.tracking.mlflow.entries import CheckpointEntry
from megamask.tracking.mlflow.points import HEAD_TAG, Memory, update_of

_MAX_MAGNITUDE = 1.7976931348623157e308  # MLflow's databases store infinity as the largest float


def contradictions(run: MLflowRun, run_dir: Path, record: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each parameter, tag, point and commit in MLflow that the run's records contradict.

    Args:
        record: content of run.json.
    """
    records = list(read_journal(run_dir))
    attempts = {key: value for line in records for key, value in update_of([line], Memory()).params.items()}
    yield from _unequal("parameter", run.params, record["identity"], "run.json")
    yield from _unequal("parameter", run.params, attempts, "the journal")
    yield from _unequal("tag", run.tags, _tags(record), "run.json")
    journalled = _journalled(records)
    for key, values in journalled.items():
        for point in run.history(key):
            known = values.get(point.step)
            if known is not None and not any(_are_equal(point.value, value) for value in known):
                journal = ", ".join(map(str, sorted(known)))
                yield f"{key} at step {point.step} is {point.value}; the journal has {journal}"
    entered = run.checkpoints()
    for name, entry in _entries(records).items():
        if name in entered:
            yield from _commit_problems(entry, entered[name])


def missing_and_foreign(run: MLflowRun, run_dir: Path) -> Iterator[str]:
    """Yield a sentence for what only one side has: points, commits, COMMIT.json artifacts, the journal's head."""
    records = list(read_journal(run_dir))
    if (head := run.tags.get(HEAD_TAG)) is not None and head not in set(_heads(run_dir)):
        yield f"tag {HEAD_TAG} is {head}, and the journal has no such line"
    for key, values in _journalled(records).items():
        stored = {point.step for point in run.history(key)}
        if missing := values.keys() - stored:
            yield f"{key} lacks {len(missing)} of {len(values)} steps, the first of them step {min(missing)}"
        if foreign := stored - values.keys():
            yield f"{key} has {len(foreign)} steps that the journal lacks, the first of them step {min(foreign)}"
    entered = run.checkpoints()
    entries = _entries(records)
    for name in sorted(entered.keys() - entries.keys()):
        yield f"checkpoint {name} is not in the journal"
    for name in sorted(entries.keys() - entered.keys()):
        yield f"checkpoint {name} is missing"
    for name in sorted(entries.keys() & entered.keys()):
        data = run.commit_artifact(name)
        if data is None and (run_dir / entries[name].location / "COMMIT.json").exists():
            yield f"checkpoint {name}: the artifact COMMIT.json is missing or cannot be read"
        if data is not None and hashlib.sha256(data).hexdigest() != entries[name].params["digest"]:
            yield f"checkpoint {name}: the artifact COMMIT.json does not have the digest of the journal"


def _unequal(kind: str, stored: Mapping[str, str], expected: Mapping[str, Any], where: str) -> Iterator[str]:
    for key, value in expected.items():
        if key in stored and stored[key] != text_of(value):
            yield f"{kind} {key} is {stored[key]!r}; {where} has {text_of(value)!r}"


def _tags(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tags that MLflow shows of run.json."""
    tags = {key: record[key] for key in ("code_version", "tokenizer_digest") if key in record}
    return tags | {f"corpus.{name}": corpus_id for name, corpus_id in record.get("corpora", {}).items()}


def _heads(run_dir: Path) -> Iterator[str]:
    for line in read_lines(run_dir):
        if (record := line.record()) is not None:
            yield f"{record['seq']}:{hashlib.sha256(line.data).hexdigest()}"


def _entries(records: Iterable[Record]) -> dict[str, CheckpointEntry]:
    """The entries of a journal's commits by folder name."""
    return {entry.checkpoint: entry for record in records for entry in update_of([record], Memory()).checkpoints}


def _commit_problems(entry: CheckpointEntry, params: Mapping[str, str]) -> Iterator[str]:
    for key in ("digest", "parent", "step", "bytes"):
        if params.get(key, entry.params[key]) != entry.params[key]:
            yield f"checkpoint {entry.checkpoint}: {key} is {params.get(key)!r}; the journal has {entry.params[key]!r}"


def _journalled(records: Iterable[Record]) -> dict[str, dict[int, set[float]]]:
    """The values of each metric by step, of every attempt that took the step."""
    found: dict[str, dict[int, set[float]]] = {}
    memory = Memory()
    for record in records:
        memory.sent_through.clear()  # a repeated step counts again
        for point in update_of([record], memory).points:
            found.setdefault(point.key, {}).setdefault(point.step, set()).add(point.value)
    return found


def _are_equal(stored: float, journalled: float) -> bool:
    if math.isinf(journalled):
        return abs(stored) >= _MAX_MAGNITUDE and (stored > 0) == (journalled > 0)
    return stored == journalled or (math.isnan(stored) and math.isnan(journalled))
