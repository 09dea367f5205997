"""The two documents that make a checkpoint folder complete by itself: state.json and model.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megamask.checkpoint.commit import Commit
from megamask.checkpoint.names import MODEL_NAME, STATE_NAME
from megamask.data.manifest_values import MAX_ROW_TOKENS
from megamask.errors import CheckpointIntegrityError, UsageError
from megamask.models.counts import parameter_count
from megamask.models.spec import ModelSpec
from megamask.models.vocabulary import NO_ID, Vocabulary
from megamask.objectives.base import Objective
from megamask.objectives.registry import build_objective
from megamask.objectives.shifted import SHIFT_KEY
from megamask.runs.laws import KNOWN_LAWS, LAWS
from megamask.storage.documents import DocumentKind, encode_document, read_document

STATE = DocumentKind(format="megamask-trainer-state", version=1, damage=CheckpointIntegrityError)
MODEL = DocumentKind(format="megamask-model", version=1, is_canonical=False, damage=CheckpointIntegrityError)
_SPECIAL_IDS = ("mask_token_id", "eod_token_id", "pad_token_id")


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """Position of training after a step: all that resuming needs beside the engine's own tensors.

    Args:
        step: completed updates.
        consumed_samples: the complete state of the data pipeline.
        consumed_tokens: clean eligible tokens, each counted once.
        seed: run.seed; evaluation of a copied checkpoint takes its masks from it.
        schedule: positions of schedules, integers and strings (training_steps, ...).
    """

    step: int
    consumed_samples: int
    consumed_tokens: int
    seed: int
    schedule: Mapping[str, int | str] = field(default_factory=dict)

    def scalars(self) -> dict[str, Any]:
        """Return the fields that COMMIT.json repeats; the seed as text: some JSON readers keep less than 64 bits."""
        return {
            "step": self.step,
            "consumed_samples": self.consumed_samples,
            "consumed_tokens": self.consumed_tokens,
            "seed": str(self.seed),
        }

    def to_bytes(self) -> bytes:
        """Return the content of state.json."""
        return encode_document(STATE, {**self.scalars(), "schedule": dict(self.schedule)})


@dataclass(frozen=True, kw_only=True)
class ModelDocument:
    """Content of model.json: enough to rebuild the network, its vocabulary and the objective it was trained for.

    Args:
        tokenizer_digest: of the checkpoint's tokenizer; None for an imported model without one.
    """

    spec: ModelSpec
    vocabulary: Vocabulary
    objective: Objective
    tokenizer_digest: str | None

    def to_json(self) -> dict[str, Any]:
        """Return the fields of model.json; real numbers are written so that they read back exactly."""
        return {
            "model": self.spec.to_json(),
            "objective": self.objective.record(),
            "shift": self.objective.record().get(SHIFT_KEY, False),
            "vocabulary_size": self.vocabulary.vocab_size,
            "padded_vocabulary_size": self.vocabulary.padded_vocab_size,
            **{name: _or_null(getattr(self.vocabulary, name)) for name in _SPECIAL_IDS},
            "tokenizer_digest": self.tokenizer_digest,
            "laws": dict(LAWS),
        }

    def to_bytes(self) -> bytes:
        """Return the content of model.json: sorted, indented, one final newline."""
        return encode_document(MODEL, self.to_json())


def read_state(folder: Path) -> TrainerState:
    """Return the trainer's state of a verified checkpoint folder.

    Raises:
        CheckpointIntegrityError: it is damaged. UsageError: a newer megamask wrote it.
    """
    document = read_document(STATE, folder / STATE_NAME)
    try:
        for name in ("step", "consumed_samples", "consumed_tokens"):
            if type(document[name]) is not int or not 0 <= document[name] < 1 << 63:
                raise ValueError(name)
        return TrainerState(
            step=document["step"],
            consumed_samples=document["consumed_samples"],
            consumed_tokens=document["consumed_tokens"],
            seed=int(document["seed"]),
            schedule=dict(document["schedule"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _misstated(folder / STATE_NAME, error) from error


def read_model(folder: Path) -> ModelDocument:
    """Return the model document of a verified checkpoint folder.

    Raises: as `read_state`, and UsageError for other laws.
    """
    path = folder / MODEL_NAME
    document = read_document(MODEL, path)
    try:
        refuse_other_laws(document["laws"], path)
        for name in ("model", "objective"):
            if not isinstance(document[name], dict):
                raise ValueError(f"{name} is not an object")
        if document["shift"] != document["objective"].get(SHIFT_KEY, False):
            raise ValueError("shift differs from that of the objective")
        return _model_of(document)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _misstated(path, error) from error


def _model_of(document: dict[str, Any]) -> ModelDocument:
    """The document's parts, each checked by its own type; what a part refuses is a misstatement of the document."""
    names = ("vocab_size", "padded_vocab_size")
    keys = ("vocabulary_size", "padded_vocabulary_size")
    sizes = {name: document[key] for name, key in zip(names, keys, strict=True)}
    sizes |= {name: NO_ID if document[name] is None else document[name] for name in _SPECIAL_IDS}
    for name in _SPECIAL_IDS:
        if document[name] == NO_ID:  # how a missing one is written in memory, never in the document
            raise ValueError(f"{name} is {document[name]}; allowed: an id, or null for none")
    if not all(type(size) is int for size in sizes.values()):
        raise ValueError(f"vocabulary {sizes}")
    if not isinstance(document["tokenizer_digest"], str | None):
        raise ValueError("tokenizer_digest is not a text")
    try:
        vocabulary = Vocabulary(**sizes)
        model = ModelDocument(
            spec=ModelSpec.from_json(document["model"]),
            vocabulary=vocabulary,
            objective=build_objective(document["objective"], vocabulary),
            tokenizer_digest=document["tokenizer_digest"],
        )
    except UsageError as error:
        raise ValueError(error.message) from error
    spec = model.spec
    if (spec.vocab_size, spec.padded_vocab_size) != (sizes["vocab_size"], sizes["padded_vocab_size"]):
        raise ValueError("the network's vocabulary is not the document's")
    return model


def _or_null(token: int) -> int | None:
    return None if token == NO_ID else token


def check_size(commit: Commit, model: ModelDocument) -> None:
    """Refuse a model.json whose network has more weights than the checkpoint has bytes for, before it is built.

    Raises:
        CheckpointIntegrityError: names both numbers.
    """
    path, needed = commit.folder / MODEL_NAME, 4 * parameter_count(model.spec)
    if needed > commit.num_bytes:
        raise CheckpointIntegrityError(
            f"{path} describes a network whose weights need {needed} bytes; all files of the checkpoint have "
            f"{commit.num_bytes}. Nothing was loaded from it."
        )
    if model.spec.max_sequence_length > MAX_ROW_TOKENS:
        raise CheckpointIntegrityError(
            f"{path} has rows of {model.spec.max_sequence_length} tokens; at most {MAX_ROW_TOKENS} are read. "
            "Nothing was loaded from it."
        )


def check_state(commit: Commit, state: TrainerState) -> None:
    """Check that the scalars in COMMIT.json equal those of state.json."""
    if dict(commit.state) != state.scalars() or commit.step != state.step:
        raise CheckpointIntegrityError(
            f"{commit.folder}: {STATE_NAME} and COMMIT.json state different positions. Nothing was loaded from it."
        )


def refuse_other_laws(laws: Mapping[str, Any], path: Path) -> None:
    """Refuse a version of a law that this program does not implement.

    Raises:
        UsageError: the document was made under another version.
    """
    if dict(laws) not in KNOWN_LAWS:
        known = " and ".join(map(str, KNOWN_LAWS))
        raise UsageError(f"{path} was made under laws {dict(laws)}; this megamask trains under {known}")


def _misstated(path: Path, error: Exception) -> CheckpointIntegrityError:
    return CheckpointIntegrityError(f"{path} lacks or misstates a field ({error}). Nothing was loaded from it.")
