"""Records of the journal: one dataclass for each kind of line, whose fields are the names in its JSON.

Writers make these; console, MLflow, status and audit read them. docs/formats.md describes the fields; a test holds the
page against the classes. A journal number that is not finite ("nan", "inf", "-inf") is a float here.

A field that a release does not write yet is None when its journal is read. Unknown fields and kinds are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, ClassVar, Self, get_args, get_origin, get_type_hints

_NOT_FINITE = frozenset({"nan", "inf", "-inf"})
# Written by the journal itself, before the fields of a kind.
ENVELOPE = ("seq", "time", "kind", "prev")


class RecordError(ValueError):
    """A line whose fields are not those of its kind."""


@dataclass(frozen=True, kw_only=True)
class JournalRecord:
    """A line of the journal.

    Args:
        seq: number of the line, from 1 over all files; 0 before it is written.
        time: of the line, UTC; empty before it is written.
    """

    kind: ClassVar[str]
    seq: int = 0
    time: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the fields of this kind, without those that the journal writes itself."""
        names = (field.name for field in fields(self))
        return {name: getattr(self, name) for name in names if name not in ENVELOPE}

    @classmethod
    def from_json(cls, line: Mapping[str, Any], *, is_strict: bool = False) -> Self:
        """Return the record of a line of this kind.

        Args:
            is_strict: a field of another type is an error; otherwise it counts as missing.

        Raises:
            RecordError: a field without a default is missing or of another type.
        """
        values: dict[str, Any] = {}
        for name, hint, is_required in _fields_of(cls):  # type: ignore[arg-type]  # mypy: a class is not Hashable
            if name not in line and not is_required:
                continue
            value = _floats(line.get(name)) if not _holds_text(hint) else line.get(name)
            if _fits(value, hint):
                values[name] = value
            elif is_strict or is_required:
                raise RecordError(f"{name} is {line.get(name, 'missing')!r}")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class RunStarted(JournalRecord):
    """First line of a run.

    Args:
        corpora: corpus id by name.
        run_sha256: of the bytes of run.json.
    """

    kind = "run_started"
    run_id: str
    corpora: dict[str, str]
    run_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class ResumedFrom:
    """Commit that an attempt resumed from: its step, folder name and digest."""

    step: int
    checkpoint: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class AttemptStarted(JournalRecord):
    """First line of an attempt.

    Args:
        layout: sizes of the axes, under their names in the config.
        num_micro_batches: per data-parallel rank and step of training.global_batch_size samples.
        datasets: name, split, corpus_id, source, rows, tokens, sequence_length, tokenizer_digest of each split.
        resumed_from: step, checkpoint and digest of the commit; None for a start from nothing.
        initialised_from: source, digest, family, target_shift and mask_row of the first weights; None where they were
            drawn, and after a resume.
        extended: extendable settings that grew: [old, new] by key.
        changed: layout, device and world size that differ from the attempt before: [old, new] by name.
        run_sha256: of the bytes of run.json.
        user: login name of the process.
        num_parameters: weights of the network, padding of the vocabulary not counted.
        num_threads: of torch on rank 0; sums on a CPU depend on it.
        layers: modules that the layers were made of: local, te or emulated.
        skipped_samples: ranges of sample indices that the attempt leaves out, [first, end) each; absent without any.
        fp8: recipe of their matrix products and what computed it, e.g. "delayed, emulated"; "none" without FP8.
    """

    kind = "attempt_started"
    attempt: int
    run_id: str | None = None
    host: str | None = None
    world_size: int | None = None
    device: str | None = None
    layout: dict[str, Any] | None = None
    num_micro_batches: int | None = None
    datasets: list[dict[str, Any]] | None = None
    code_version: str | None = None
    libraries: dict[str, Any] | None = None
    resumed_from: dict[str, Any] | None = None
    initialised_from: dict[str, Any] | None = None
    extended: dict[str, Any] | None = None
    changed: dict[str, Any] | None = None
    restore_s: float | None = None
    startup_s: dict[str, Any] | None = None
    run_sha256: str | None = None
    user: str | None = None
    num_parameters: int | None = None
    num_threads: int | None = None
    layers: str | None = None
    fp8: str | None = None
    skipped_samples: list[Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """As of every record; a run that leaves no samples out does not mention them."""
        found = super().to_json()
        if found["skipped_samples"] is None:
            del found["skipped_samples"]
        return found

    @property
    def resumed(self) -> ResumedFrom | None:
        """The commit in `resumed_from`.

        Raises:
            KeyError: a field is missing.
        """
        found = self.resumed_from
        if found is None:
            return None
        return ResumedFrom(step=found["step"], checkpoint=found["checkpoint"], digest=found["digest"])


@dataclass(frozen=True, kw_only=True)
class Step(JournalRecord):
    """A completed step. Losses in nats per token; times in seconds; token counts are of the global batch.

    Args:
        is_skipped: true where the guard left out the step's update; absent elsewhere.
    """

    kind = "step"
    step: int
    loss: float | None = None
    loss_terms: dict[str, Any] | None = None
    nelbo_nats_per_token: float | None = None
    loss_by_noise_level: list[Any] | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None
    global_batch_size: int | None = None
    consumed_samples: int | None = None
    consumed_tokens: int | None = None
    consumed_by_source: dict[str, Any] | None = None
    processed_tokens: int | None = None
    masked_tokens: int | None = None
    masked_tokens_by_noise_level: list[Any] | None = None
    batch_digest: str | None = None
    content_digest: str | None = None
    router_max_load: list[Any] | None = None
    router_idle_experts: list[Any] | None = None
    is_skipped: bool | None = None
    seconds: dict[str, Any] | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation(JournalRecord):
    """The bound on held-out text, measured during training: that of the first corpus.

    Args:
        by_source: the same figures of each corpus of a mixture, by name.
        objective: name, block_size and target_shift of what the bound is of, where they change during the run.
        bound_from_step: first step whose bounds are of that kind; only those are compared with one another.
        pair_variance: ratio, low, high (of its 95 % interval) and num_pairs, where they were asked for.
        clip_search: low, high, variance, full_variance and num_blocks, where they were asked for.
    """

    kind = "evaluation"
    step: int
    nelbo_nats_per_token: float | None = None
    standard_error: float | None = None
    bits_per_byte: float | None = None
    num_tokens: int | None = None
    num_bytes: int | None = None
    num_samples: int | None = None
    by_source: dict[str, Any] | None = None
    objective: dict[str, Any] | None = None
    bound_from_step: int | None = None
    pair_variance: dict[str, Any] | None = None
    clip_search: dict[str, Any] | None = None
    seconds: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class CheckpointStarted(JournalRecord):
    """A save begins."""

    kind = "checkpoint_started"
    step: int


@dataclass(frozen=True, kw_only=True)
class CheckpointCommitted(JournalRecord):
    """A checkpoint became visible.

    Args:
        checkpoint: name of its folder. location: the folder, relative to the run directory.
        digest: sha256 of COMMIT.json. parent: of the commit before it.
        stall_s: time that training waited. save_s: from the beginning to COMMIT.json. None where it is not known.
        evaluation: nelbo_nats_per_token and standard_error measured at this step, and bound_from_step where it has one.
    """

    kind = "checkpoint_committed"
    step: int
    checkpoint: str | None = None
    location: str | None = None
    digest: str | None = None
    parent: str | None = None
    bytes: int | None = None
    stall_s: float | None = None
    save_s: float | None = None
    evaluation: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class CheckpointPruned(JournalRecord):
    """The retention rule removed a checkpoint, at this step."""

    kind = "checkpoint_pruned"
    step: int
    checkpoint: str


@dataclass(frozen=True, kw_only=True)
class Incident(JournalRecord):
    """A fault that training survived, or that ended it; further fields belong to the incident's name."""

    kind = "incident"
    incident: str
    problem: str
    checkpoint: str | None = None


@dataclass(frozen=True, kw_only=True)
class Straggler(JournalRecord):
    """A rank that was slower than the others in three windows in a row (training/stragglers.py).

    Args:
        node: of the rank, as its scheduler calls it.
        section: `data` for reading, `passes` for its forward and backward passes.
        seconds_per_step, median_s: mean of the last window, of this rank and the median of all.
    """

    kind = "straggler"
    step: int
    rank: int
    node: str
    section: str
    seconds_per_step: float | None = None
    median_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class SamplePreview(JournalRecord):
    """Texts that the network wrote during training.

    Args:
        samples: prompt, text, num_tokens, nfe and sequence of each.
        seed: of the sampling noise.
    """

    kind = "sample_preview"
    step: int
    samples: list[dict[str, Any]]
    denoising_steps: int | None = None
    temperature: float | None = None
    seed: int | None = None
    seconds: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class AttemptEnded(JournalRecord):
    """An attempt ended as its ranks agreed, or with an error."""

    kind = "attempt_ended"
    attempt: int | None = None
    phase: str | None = None
    exit_code: int | None = None
    step: int | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunCompleted(JournalRecord):
    """All steps are done."""

    kind = "run_completed"
    step: int
    consumed_tokens: int | None = None


RECORDS: Mapping[str, type[JournalRecord]] = {
    record.kind: record
    for record in (
        RunStarted,
        AttemptStarted,
        Step,
        Evaluation,
        CheckpointStarted,
        CheckpointCommitted,
        CheckpointPruned,
        Incident,
        Straggler,
        SamplePreview,
        AttemptEnded,
        RunCompleted,
    )
}


def read_record(line: Mapping[str, Any], *, is_strict: bool = False) -> JournalRecord | None:
    """Return the typed record of a line; None for a kind that this program does not know.

    A line without what its kind cannot do without is None as well, unless `is_strict`.

    Raises:
        RecordError: `is_strict`, and a field is missing or of another type.
    """
    kind = RECORDS.get(line["kind"])
    if kind is None:
        return None
    try:
        return kind.from_json(line, is_strict=is_strict)
    except RecordError:
        if is_strict:
            raise
        return None


@cache
def _fields_of(kind: Callable[..., JournalRecord]) -> list[tuple[str, Any, bool]]:
    """(name, type, whether it is required) of each field."""
    hints = get_type_hints(kind)
    return [(field.name, hints[field.name], field.default is MISSING) for field in fields(kind)]  # type: ignore[arg-type]


def _holds_text(hint: Any) -> bool:
    return hint is str or str in get_args(hint)


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is UnionType:
        return any(_fits(value, option) for option in get_args(hint))
    if hint is NoneType:
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return type(value) is int
    return isinstance(value, get_origin(hint) or hint)


def _floats(value: Any) -> Any:
    """The value with the journal's three numbers that are not finite as floats, inside lists and objects too."""
    if isinstance(value, str):
        return float(value) if value in _NOT_FINITE else value
    if isinstance(value, list):
        return [_floats(item) for item in value]
    if isinstance(value, dict):
        return {name: _floats(item) for name, item in value.items()}
    return value
