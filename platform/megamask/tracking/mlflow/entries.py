"""What MLflow keeps of a journal beside curves: datasets, checkpoints, previews. Pure: nothing here knows MLflow."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from megamask.tracking.journal.lines import Record

# MLflow refuses a longer digest of a dataset; the whole corpus id stands in the profile and in a tag.
DATASET_DIGEST_CHARACTERS = 36
COMMITTED, PRUNED, DAMAGED = "committed", "pruned", "damaged"
CHECKPOINT_TAG = "megamask.checkpoint"
STATE_TAG = "megamask.state"
NOTE_TAG = "mlflow.note.content"  # what MLflow's page shows as the description
_CONTEXTS = {"train": "training", "validation": "validation"}
_ATTEMPT_OF_FOLDER = re.compile(r"-a(\d+)$")


class Point(NamedTuple):
    """One value of a metric; the time is in milliseconds since 1970."""

    key: str
    value: float
    timestamp_ms: int
    step: int


@dataclass(frozen=True, kw_only=True)
class DatasetEntry:
    """One split of a corpus as MLflow shows it among a run's datasets.

    Args:
        name: corpus and split, as "main/train".
        digest: the beginning of the corpus id.
        source: the corpus' folder.
        profile: rows, tokens, sequence_length, tokenizer digest and the whole corpus id.
        tags: of the input: its context ("training" or "validation") and the whole corpus id.
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
        checkpoint: name of its folder, which tells it from every other commit of the run.
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


def datasets_of(record: Record) -> list[DatasetEntry]:
    """The datasets that an `attempt_started` record names; none where it was written before they were journalled."""
    return [_dataset(described) for described in record.get("datasets") or []]


def _dataset(described: dict[str, Any]) -> DatasetEntry:
    corpus_id, split = str(described["corpus_id"]), str(described["split"])
    profile = ("rows", "tokens", "sequence_length", "tokenizer_digest")
    return DatasetEntry(
        name=f"{described['name']}/{split}",
        digest=corpus_id[:DATASET_DIGEST_CHARACTERS],
        source=str(described["source"]),
        profile={**{key: described.get(key) for key in profile}, "corpus_id": corpus_id},
        tags={"mlflow.data.context": _CONTEXTS.get(split, split), "megamask.corpus_id": corpus_id},
    )


def checkpoint_of(record: Record) -> CheckpointEntry:
    """What a `checkpoint_committed` record says of its commit."""
    step = int(record["step"])
    name = f"step-{step:08d}"
    checkpoint = str(record.get("checkpoint") or name)
    location = str(record.get("location") or f"checkpoints/{checkpoint}")
    attempt = _ATTEMPT_OF_FOLDER.search(checkpoint)
    facts = {
        "step": step,
        "attempt": int(attempt[1]) if attempt else None,
        "digest": record.get("digest"),
        "parent": record.get("parent"),
        "bytes": record.get("bytes"),
        "location": location,
        "committed": record["time"],
    }
    evaluation = record.get("evaluation") or {}
    values = {
        "nelbo_nats_per_token": evaluation.get("nelbo_nats_per_token"),
        "standard_error": evaluation.get("standard_error"),
        "stall_s": record.get("stall_s"),
        "save_s": record.get("save_s"),
    }
    time = milliseconds(record["time"])
    return CheckpointEntry(
        checkpoint=checkpoint,
        name=name,
        step=step,
        location=location,
        params={key: "none" if value is None else str(value) for key, value in facts.items()},
        tags={
            CHECKPOINT_TAG: checkpoint,
            "megamask.digest": str(record.get("digest")),
            STATE_TAG: COMMITTED,
            NOTE_TAG: f"Committed. Its files are in `{location}` of the run directory; "
            "`megamask verify checkpoint` reads every byte of them.",
        },
        points=[
            Point(f"checkpoint/{key}", value_of, time, step)
            for key, value in values.items()
            if (value_of := number(value)) is not None
        ],
    )


def pruned_marks(record: Record) -> dict[str, str]:
    """The tags of a commit that a `checkpoint_pruned` record tells of."""
    step = str(record.get("step"))
    note = f"Pruned at step {step}: the retention rule removed its files. This entry stays."
    return {STATE_TAG: PRUNED, "megamask.pruned_at_step": step, NOTE_TAG: note}


def damaged_marks(record: Record) -> dict[str, str]:
    """The tags of a commit that an incident calls damaged."""
    problem = str(record.get("problem"))
    return {STATE_TAG: DAMAGED, "megamask.problem": problem, NOTE_TAG: f"Damaged: {problem}"}


def preview_of(record: Record) -> tuple[str, str]:
    """(path among the run's artifacts, text) of a `sample_preview` record."""
    step = int(record["step"])
    header = [f"step {step}"]
    if record.get("denoising_steps") is not None:
        header.append(f"{record['denoising_steps']} denoising steps")
    if record.get("temperature") is not None:
        header.append(f"temperature {record['temperature']:g}")
    parts = [", ".join(header)]
    for sample in record.get("samples") or []:
        facts = f"{sample.get('num_tokens')} tokens, {sample.get('nfe')} forward passes"
        prompt = json.dumps(sample.get("prompt", ""), ensure_ascii=False)
        parts.append(f"--- prompt {prompt}, {facts}\n{sample.get('text', '')}")
    return f"previews/step-{step:08d}.txt", "\n\n".join(parts) + "\n"


def milliseconds(time: str) -> int:
    """A journal's time as milliseconds since 1970, cut off, so that the same record always gives the same point."""
    moment = datetime.fromisoformat(time)
    return int(moment.timestamp()) * 1000 + moment.microsecond // 1000


def is_special(value: str) -> bool:
    """Whether a text is one of the journal's three numbers that are not finite."""
    return value in ("nan", "inf", "-inf")


def number(value: Any) -> float | None:
    """A journal's number as a float, or None for what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    return float(value) if not isinstance(value, str) or is_special(value) else None
