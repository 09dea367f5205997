"""Saving: durable, then hashed, then visible. Every function here is called by all ranks together."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from megamask.checkpoint.agreement import CheckpointEngine, agree, captured, on_main
from megamask.checkpoint.commit import Commit, CommitFields, FileDigest, begin, publish
from megamask.checkpoint.contents import ModelDocument, TrainerState
from megamask.checkpoint.integrity import digest_and_flush
from megamask.checkpoint.names import MODEL_NAME, STATE_NAME, TOKENIZER_NAME
from megamask.checkpoint.retention import remove_committed
from megamask.engine.collectives import TORCH_WRITE_FAILURES
from megamask.errors import MegamaskError, StorageError, SupersededError
from megamask.storage.durable import fsync_directory, storage_errors


def save(
    engine: CheckpointEngine,
    run_dir: Path,
    *,
    attempt: int,
    state: TrainerState,
    model: ModelDocument,
    tokenizer_folder: Path,
    corpora: Mapping[str, str],
    journal_head: tuple[int, str],
    run_id: str,
    parent: str | None,
    check_claim: Callable[[], None],
) -> Commit:
    """Commits a checkpoint of the engine's present state; collective and blocking.

    Data first, flushed and hashed by the rank that wrote it; then, on rank 0, `check_claim` and COMMIT.json.

    Args:
        journal_head: sequence number and sha256 of the last journal line.
        parent: digest of the commit this state descends from, None before the first.
        check_claim: called on rank 0 right before the commit; raises SupersededError if a newer attempt owns the run.

    Returns: the commit, on every rank.
    Raises:
        StorageError: the storage refused; nothing became visible and earlier commits are intact.
        SupersededError: as `check_claim` says; nothing became visible.
    """
    folder = on_main(engine, lambda: begin(run_dir, state.step, attempt))
    fields = CommitFields(
        run_id=run_id,
        parent=parent,
        state=state.scalars(),
        corpora=dict(corpora),
        journal={"seq": journal_head[0], "sha256": journal_head[1]},
    )
    published: list[Commit] = []
    try:
        files = _write(engine, folder, state=state, model=model, tokenizer_folder=tokenizer_folder)
        return on_main(engine, lambda: _commit(folder, files, fields, check_claim, published))
    except BaseException as error:
        if engine.is_main and not published:  # a peer that is lost after the commit does not undo it
            with contextlib.suppress(OSError, StorageError):  # what cannot be removed is swept by the next attempt
                remove_committed(folder)  # COMMIT.json may stand if only its last flush failed
            if not isinstance(error, SupersededError):
                check_claim()  # a newer attempt may have swept the folder: then that is what happened
        raise


def _write(
    engine: CheckpointEngine, folder: Path, *, state: TrainerState, model: ModelDocument, tokenizer_folder: Path
) -> dict[str, FileDigest]:
    """Writes everything but COMMIT.json; returns the digests of all ranks' files on rank 0 (empty elsewhere)."""
    failures: list[BaseException] = []
    names: list[str] = []
    with captured(failures):
        names += _engine_files(engine, folder)
    agree(engine, failures)
    if engine.is_main:
        with captured(failures):
            names += _write_documents(folder, state, model, tokenizer_folder)
    own: dict[str, FileDigest] = {}
    if not failures:
        with captured(failures):
            own = {name: digest_and_flush(folder, name) for name in sorted(set(names))}
    agree(engine, failures)
    gathered = engine.gather_objects(own)
    return on_main(engine, lambda: _union(folder, gathered))


def _engine_files(engine: CheckpointEngine, folder: Path) -> list[str]:
    try:
        with storage_errors(f"writing {folder}"):
            return engine.save_state(folder)
    except RuntimeError as error:
        if any(text in str(error) for text in TORCH_WRITE_FAILURES):
            raise StorageError(
                f"writing {folder}: the storage took no more; the disk is full, or a quota or the file-size limit is "
                f"reached ({str(error).splitlines()[0]}). Nothing was published.",
                hint="free space or choose another folder, then run again",
            ) from error
        raise


def _write_documents(folder: Path, state: TrainerState, model: ModelDocument, tokenizer_folder: Path) -> list[str]:
    with storage_errors(f"writing {folder}"):
        (folder / STATE_NAME).write_bytes(state.to_bytes())
        (folder / MODEL_NAME).write_bytes(model.to_bytes())
        (folder / TOKENIZER_NAME).mkdir()
        names = [STATE_NAME, MODEL_NAME]
        for source in sorted(tokenizer_folder.iterdir()):
            if source.is_file():
                names.append(f"{TOKENIZER_NAME}/{source.name}")
                (folder / names[-1]).write_bytes(source.read_bytes())
    return names


def _union(folder: Path, gathered: list[dict[str, FileDigest]]) -> dict[str, FileDigest]:
    """All ranks' files; each must have exactly one writer, and no file may be without one."""
    files: dict[str, FileDigest] = {}
    for rank, own in enumerate(gathered):
        for name, digest in own.items():
            if name in files:
                raise MegamaskError(f"rank {rank} wrote {name} of {folder}, which another rank wrote too")
            files[name] = digest
    present = {str((Path(parent) / name).relative_to(folder)) for parent, _, names in os.walk(folder) for name in names}
    if unclaimed := sorted(present - set(files)):
        raise MegamaskError(f"no rank says that it wrote {unclaimed[0]} of {folder}; nothing was published")
    return files


def _commit(
    folder: Path,
    files: Mapping[str, FileDigest],
    fields: CommitFields,
    check_claim: Callable[[], None],
    published: list[Commit],
) -> Commit:
    with storage_errors(f"flushing {folder}"):
        for parent, _, _ in os.walk(folder, topdown=False):
            fsync_directory(Path(parent))
        fsync_directory(folder.parent)
    check_claim()
    published.append(publish(folder, files, fields))
    return published[0]
