"""Checkpoints that no run wrote: where their weights come from, and how such a folder is published.

An imported or averaged model is a checkpoint like any other for `evaluate`, `sample`, `convert` and `verify`, and a
source for `initialise.source`. It has weights and no optimizer state, so no run resumes from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megamask.checkpoint.commit import Commit, CommitFields, FileDigest, write_commit
from megamask.checkpoint.contents import ModelDocument, TrainerState
from megamask.checkpoint.integrity import digest_and_flush
from megamask.checkpoint.names import COMMIT_NAME, MODEL_NAME, ORIGIN_NAME, STATE_NAME
from megamask.errors import CheckpointIntegrityError
from megamask.storage.documents import DocumentKind, encode_document, read_document
from megamask.storage.durable import fsync_directory, storage_errors, write_atomic

ORIGIN = DocumentKind(format="megamask-origin", version=1, is_canonical=False, damage=CheckpointIntegrityError)
NO_RUN = "none"
"""run_id of a checkpoint that no run wrote."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Origin of the weights of a checkpoint without a run.

    Args:
        kind: "imported" from a published model, or the "average" of checkpoints.
        family: of a published model (models/families/), None for an average.
        architecture: `architectures[0]` of its config.json.
        attention: "causal", "bidirectional" or "block_causal", what the weights were trained with.
        target_shift: whether the logits at a position predict the token after it.
        block_size: tokens of a diffusion block that was trained with, or None.
        ids: mask, eos, pad, bos -> id, those that the published files name.
        dtype: number format of most published tensors, as safetensors names it.
        other_dtypes: published name -> number format of the tensors stored otherwise.
        tokenizer_problem: why the published tokenizer is not this checkpoint's; None if it is, or there is none.
        has_merged_experts: the published experts of a layer are one tensor a projection.
        checkpoints: of an average: digest and step of each checkpoint, in their order.
    """

    kind: Literal["imported", "average"]
    family: str | None = None
    architecture: str | None = None
    attention: str | None = None
    target_shift: bool | None = None
    block_size: int | None = None
    ids: Mapping[str, int] = field(default_factory=dict)
    dtype: str | None = None
    other_dtypes: Mapping[str, str] = field(default_factory=dict)
    tokenizer_problem: str | None = None
    has_merged_experts: bool = False
    checkpoints: tuple[Mapping[str, Any], ...] = ()

    def to_bytes(self) -> bytes:
        """Return the content of origin.json."""
        content = asdict(self)
        if not self.has_merged_experts:  # a field that versions before it do not know
            del content["has_merged_experts"]
        return encode_document(ORIGIN, content)


def read_origin(commit: Commit) -> Origin | None:
    """The origin of a checkpoint that no run wrote; None for a run's own.

    Raises:
        CheckpointIntegrityError: the document is damaged. UsageError: a newer megamask wrote it.
    """
    if ORIGIN_NAME not in commit.files:
        return None
    path = commit.folder / ORIGIN_NAME
    document = read_document(ORIGIN, path)
    document = {name: value for name, value in document.items() if name not in ("format", "version")}
    try:
        origin = Origin(**document)
        if origin.kind not in ("imported", "average") or not isinstance(origin.ids, dict):
            raise ValueError("kind or ids")
    except (TypeError, ValueError) as error:
        raise ORIGIN.damaged(path, f"lacks or misstates a field ({error})") from error
    return origin


def publish_without_run(
    folder: Path,
    names: list[str],
    *,
    origin: Origin,
    model: ModelDocument,
    state: TrainerState,
    documents: Mapping[str, bytes],
) -> Commit:
    """Make a folder with the weights of a network a checkpoint.

    Args:
        folder: holds the files `names` already; a COMMIT.json in it is replaced.
        documents: relative name -> content of further files, the tokenizer's among them.

    Raises:
        StorageError: the storage refused; the folder has no COMMIT.json.
    """
    written = {
        ORIGIN_NAME: origin.to_bytes(),
        MODEL_NAME: model.to_bytes(),
        STATE_NAME: state.to_bytes(),
        **documents,
    }
    with storage_errors(f"writing {folder}"):
        (folder / COMMIT_NAME).unlink(missing_ok=True)
        for name, data in written.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / name, data)
        files: dict[str, FileDigest] = {name: digest_and_flush(folder, name) for name in sorted([*names, *written])}
        for path in {folder, *((folder / name).parent for name in files)}:
            fsync_directory(path)
    fields = CommitFields(run_id=NO_RUN, state=state.scalars())
    return write_commit(folder, (state.step, 0), files, fields)
