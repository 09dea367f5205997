"""Entries that a journal gives MLflow beside curves: datasets, checkpoints, previews. Pure, without MLflow."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from megamask.tracking.records import AttemptStarted, CheckpointCommitted, CheckpointPruned, Incident, SamplePreview

# MLflow refuses a longer digest of a dataset; the full corpus id is in the profile and in a tag.
DATASET_DIGEST_CHARACTERS = 36
COMMITTED, PRUNED, DAMAGED = "committed", "pruned", "damaged"
CHECKPOINT_TAG = "checkpoint"
STATE_TAG = "state"
NOTE_TAG = "mlflow.note.content"  # what MLflow's page shows as the description
_CONTEXTS = {"train": "training", "validation": "validation"}
_ATTEMPT_OF_FOLDER = re.compile(r"-a(\d+)$")


class Point(NamedTuple):
    """One value of a metric; the time is in milliseconds since 1970.

    `dataset` is the name and digest of the dataset that it was measured on, if MLflow has it as an input of the run.
    """

    key: str
    value: float
    timestamp_ms: int
    step: int
    dataset: tuple[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class DatasetEntry:
    """One split of a corpus as MLflow shows it among a run's datasets.

    Args:
        name: corpus and split, as "main/train".
        digest: the beginning of the corpus id.
        source: the corpus' folder.
        profile: rows, tokens, sequence_length, tokenizer digest and the full corpus id.
        tags: of the input: its context ("training" or "validation") and the full corpus id.
    """

    name: str
    digest: str
    source: str
    profile: dict[str, Any]
    tags: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class CheckpointEntry:
    """One commit as MLflow shows it among a run's models.

    Args:
        checkpoint: name of its folder, unique among the commits of the run.
        name: what a list shows, as "step-00000200".
        location: its folder, relative to the run directory.
        params, tags: text by name; params never change, `megamask.state` does.
        points: what was measured of it.
    """

    checkpoint: str
    name: str
    step: int
    location: str
    params: dict[str, str]
    tags: dict[str, str]
    points: list[Point] = field(default_factory=list)


def datasets_of(record: AttemptStarted) -> list[DatasetEntry]:
    """Return the datasets that an attempt names; none where it was written before they were journalled."""
    return [_dataset(described) for described in record.datasets or []]


def dataset_key(described: Mapping[str, Any]) -> tuple[str, str]:
    """Return the name and digest that MLflow knows a split of a corpus by."""
    return f"{described['name']}/{described['split']}", str(described["corpus_id"])[:DATASET_DIGEST_CHARACTERS]


def _dataset(described: Mapping[str, Any]) -> DatasetEntry:
    corpus_id, split = str(described["corpus_id"]), str(described["split"])
    name, digest = dataset_key(described)
    facts = ("rows", "tokens", "sequence_length", "tokenizer_digest")
    return DatasetEntry(
        name=name,
        digest=digest,
        source=str(described["source"]),
        profile={**{key: described.get(key) for key in facts}, "corpus_id": corpus_id},
        tags={"mlflow.data.context": _CONTEXTS.get(split, split), "corpus_id": corpus_id},
    )


def checkpoint_of(record: CheckpointCommitted, dataset: tuple[str, str] | None = None) -> CheckpointEntry:
    """Return the entry of a commit.

    Args:
        dataset: that its bound was measured on.
    """
    step = record.step
    name = f"step-{step:08d}"
    checkpoint = record.checkpoint or name
    location = record.location or f"checkpoints/{checkpoint}"
    attempt = _ATTEMPT_OF_FOLDER.search(checkpoint)
    facts = {
        "step": step,
        "attempt": int(attempt[1]) if attempt else None,
        "digest": record.digest,
        "parent": record.parent,
        "bytes": record.bytes,
        "location": location,
        "committed": record.time,
    }
    evaluation = record.evaluation or {}
    measured = {
        "bound_nats_per_token": evaluation.get("nelbo_nats_per_token"),
        "standard_error_nats_per_token": evaluation.get("standard_error"),
    }
    taken = {"stall_s": record.stall_s, "save_s": record.save_s}
    time = milliseconds(record.time)
    return CheckpointEntry(
        checkpoint=checkpoint,
        name=name,
        step=step,
        location=location,
        params={key: "none" if value is None else str(value) for key, value in facts.items()},
        tags={
            CHECKPOINT_TAG: checkpoint,
            "digest": str(record.digest),
            STATE_TAG: COMMITTED,
            NOTE_TAG: f"Committed. Its files are in `{location}` of the run directory; "
            "`megamask verify checkpoint` reads every byte of them.",
        },
        points=[
            Point(f"checkpoint/{key}", float(value), time, step, dataset if key in measured else None)
            for key, value in (measured | taken).items()
            if value is not None
        ],
    )


def pruned_marks(record: CheckpointPruned) -> dict[str, str]:
    """Return the tags of a commit that was pruned."""
    note = f"Pruned at step {record.step}: the retention rule removed its files. This entry stays."
    return {STATE_TAG: PRUNED, "pruned_at_step": str(record.step), NOTE_TAG: note}


def damaged_marks(record: Incident) -> dict[str, str]:
    """Return the tags of a commit that an incident calls damaged."""
    return {STATE_TAG: DAMAGED, "problem": record.problem, NOTE_TAG: f"Damaged: {record.problem}"}


def preview_of(record: SamplePreview) -> tuple[str, str]:
    """Return (path among the run's artifacts, text) of a preview."""
    header = [f"step {record.step}"]
    if record.denoising_steps is not None:
        header.append(f"{record.denoising_steps} denoising steps")
    if record.temperature is not None:
        header.append(f"temperature {record.temperature:g}")
    parts = [", ".join(header)]
    for sample in record.samples:
        facts = f"{sample.get('num_tokens')} tokens, {sample.get('nfe')} forward passes"
        prompt = json.dumps(sample.get("prompt", ""), ensure_ascii=False)
        parts.append(f"--- prompt {prompt}, {facts}\n{sample.get('text', '')}")
    return f"previews/step-{record.step:08d}.txt", "\n\n".join(parts) + "\n"


def milliseconds(time: str) -> int:
    """Return a journal's time as milliseconds since 1970, cut off: the same record always gives the same point."""
    moment = datetime.fromisoformat(time)
    return int(moment.timestamp()) * 1000 + moment.microsecond // 1000
