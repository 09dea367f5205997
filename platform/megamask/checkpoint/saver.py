"""Saving: durable, then hashed, then visible; beside training, or while it waits."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megamask.checkpoint.agreement import CheckpointEngine, StateShare, agree, captured, on_main
from megamask.checkpoint.background import Gate, Work, all_done
from megamask.checkpoint.commit import Commit, CommitFields, FileDigest, begin, publish
from megamask.checkpoint.contents import ModelDocument, TrainerState
from megamask.checkpoint.integrity import digest_and_flush
from megamask.checkpoint.names import MODEL_NAME, STATE_NAME, TOKENIZER_NAME
from megamask.checkpoint.retention import remove_committed
from megamask.errors import DataIntegrityError, MegamaskError, StorageError, SupersededError
from megamask.runs.laws import LAWS
from megamask.storage.durable import fsync_directory, storage_errors
from megamask.storage.fault_points import reached


@dataclass(frozen=True, kw_only=True)
class SaveRequest:
    """Content of a checkpoint beside the engine's state.

    Args:
        journal_head: sequence number and sha256 of the journal's last line, which is flushed.
        parent: digest of the commit this state descends from, None before the first.
        evaluation: the bound measured at this very step, numbers as text, or None.
        run_sha256: of the run's run.json.
        check_claim: called on rank 0 right before the commit; raises SupersededError if a newer attempt owns the run.
    """

    attempt: int
    state: TrainerState
    model: ModelDocument
    tokenizer_folder: Path
    corpora: Mapping[str, str]
    journal_head: tuple[int, str]
    run_id: str
    parent: str | None
    check_claim: Callable[[], None]
    evaluation: Mapping[str, str] | None = None
    run_sha256: str | None = None
    laws: Mapping[str, int] = field(default_factory=lambda: dict(LAWS))

    def fields(self) -> CommitFields:
        """Return the fields of COMMIT.json."""
        return CommitFields(
            run_id=self.run_id,
            parent=self.parent,
            state=self.state.scalars(),
            corpora=dict(self.corpora),
            journal={"seq": self.journal_head[0], "sha256": self.journal_head[1]},
            evaluation=self.evaluation,
            run_sha256=self.run_sha256,
            laws=self.laws,
        )


Files = dict[str, FileDigest]


@dataclass(frozen=True, kw_only=True)
class _Published:
    commit: Commit
    seconds: float


class Save:
    """A pending checkpoint, until COMMIT.json; constructor, `poll` and `wait` are called by all ranks together.

    First every rank writes, flushes and hashes its own share; when all have, rank 0 reads the headers of the state's
    files, flushes the folders, asks `check_claim` and creates COMMIT.json. Both stages run in a thread or, if asked, at
    once.

    Args:
        in_background: copy the state and write the copy in a thread; else the state itself is written, right here.

    Raises:
        StorageError: the storage refused; nothing became visible and earlier commits are intact.
        SupersededError: raised by `check_claim`; nothing became visible.
    """

    def __init__(self, engine: CheckpointEngine, run_dir: Path, request: SaveRequest, *, in_background: bool) -> None:
        self._engine = engine
        self._request = request
        self._in_background = in_background
        self._started = time.monotonic()
        self._folder = on_main(engine, lambda: begin(run_dir, request.state.step, request.attempt))
        self._shares: list[StateShare] = []
        self._published: list[_Published] = []
        self._publishing: Work[None] | None = None
        failures: list[BaseException] = []
        with captured(failures):  # raised at the next poll, on every rank, as every other failure
            self._shares.append(engine.state_share(copy=in_background))
        self._writing = Work(lambda gate: self._write(failures, gate), in_thread=in_background and not failures)

    @property
    def step(self) -> int:
        """Step of the state that is saved."""
        return self._request.state.step

    @property
    def seconds(self) -> float:
        """Seconds from the start until it became visible; known on rank 0, 0 elsewhere."""
        return self._published[0].seconds if self._published else 0.0

    def poll(self) -> Commit | None:
        """Return the commit, on every rank, once it is visible; None while the save is pending."""
        return self._guarded(lambda: self._advance(wait=False))

    def wait(self) -> Commit:
        """Wait for the commit."""
        while (commit := self._guarded(lambda: self._advance(wait=True))) is None:
            pass
        return commit

    def cancel(self) -> None:
        """Ask this rank's pending work to end, without waiting for it; `abort` follows."""
        (self._publishing or self._writing).cancel()

    def abort(self, *, together: bool) -> None:
        """Abort the save: nothing of it becomes visible unless it is already.

        Args:
            together: all ranks call this, so that no rank writes any more when rank 0 removes the folder.
        """
        has_stopped = self._stop()
        if together:
            agree(self._engine, [])
        self._remove(has_stopped)

    def _guarded(self, action: Callable[[], Commit | None]) -> Commit | None:
        try:
            return action()
        except BaseException as error:
            self._remove(self._stop())
            if self._engine.is_main and not self._published and not isinstance(error, SupersededError):
                self._request.check_claim()  # a newer attempt may have swept the folder: then it is the cause
            raise

    def _advance(self, *, wait: bool) -> Commit | None:
        # States, alike on every rank, since only agreement moves them:
        #   writing      every rank's thread writes and hashes its share
        #   publishing   all shares are durable; rank 0's thread checks headers and claim and creates COMMIT.json
        #   published    rank 0 has the commit and broadcasts it
        # A transition needs every rank's work done, so COMMIT.json never names a file that is still being written. The
        # digests are gathered here, by the thread that trains: no other thread makes a collective call.
        if self._publishing is None:
            if all_done(self._engine, self._writing, wait=wait):
                gathered = self._engine.gather_objects(self._writing.result)
                self._publishing = Work(
                    lambda gate: self._publish(gathered, gate),
                    in_thread=self._in_background and self._engine.is_main,
                )
            return None  # the next poll looks at rank 0's commit, so that no poll waits for the disk
        if not all_done(self._engine, self._publishing, wait=wait):
            return None
        commit: Commit = self._engine.broadcast_object(self._published[0].commit if self._engine.is_main else None)
        return commit

    def _stop(self) -> bool:
        return (self._publishing or self._writing).stop()

    def _remove(self, has_stopped: bool) -> None:
        """Remove the invisible folder, on rank 0; if the writer hangs, the next attempt sweeps it."""
        if self._engine.is_main and has_stopped and not self._published:
            with contextlib.suppress(OSError, StorageError):  # the next attempt sweeps it
                remove_committed(self._folder)  # COMMIT.json may exist if only its last flush failed

    def _write(self, failures: Sequence[BaseException], gate: Gate) -> Files:
        """Write, flush and hash everything that this rank contributes."""
        if failures:
            raise failures[0]
        folder, request = self._folder, self._request
        reached("checkpoint.share_taken")
        with storage_errors(f"writing {folder}"):
            names = self._shares[0].write(folder, gate)
            reached("checkpoint.state_written")
        if self._engine.is_main:
            names = names + _write_documents(folder, request.state, request.model, request.tokenizer_folder)
            reached("checkpoint.documents_written")
        files = {}
        for name in sorted(set(names)):
            gate()
            files[name] = digest_and_flush(folder, name, gate)
            reached("checkpoint.file_flushed")
        reached("checkpoint.share_flushed")
        return files

    def _publish(self, gathered: Sequence[Files], gate: Gate) -> None:
        """Check headers, flush folders, check the claim and create COMMIT.json; on rank 0."""
        if not self._engine.is_main:
            return
        folder = self._folder
        files = _union(gathered, folder)
        _refuse_unclaimed(folder, files)
        self._shares[0].check(folder)
        reached("checkpoint.state_checked")
        with storage_errors(f"flushing {folder}"):
            for parent, _, _ in os.walk(folder, topdown=False):
                fsync_directory(Path(parent))
            fsync_directory(folder.parent)
        reached("checkpoint.flushed")
        # As late as possible: a newer attempt that claims after this line sees either this commit or no folder.
        self._request.check_claim()
        gate()
        reached("checkpoint.claim_checked")
        commit = publish(folder, files, self._request.fields())
        self._published.append(_Published(commit=commit, seconds=time.monotonic() - self._started))


def save(engine: CheckpointEngine, run_dir: Path, **request: Any) -> Commit:
    """Commit a checkpoint of the engine's present state; collective and blocking, nothing is copied.

    Args:
        request: the fields of SaveRequest.

    Returns: the commit, on every rank.
    Raises: as Save.
    """
    return Save(engine, run_dir, SaveRequest(**request), in_background=False).wait()


def _write_documents(folder: Path, state: TrainerState, model: ModelDocument, tokenizer_folder: Path) -> list[str]:
    tokenizer = _tokenizer_files(tokenizer_folder)
    with storage_errors(f"writing {folder}"):
        (folder / STATE_NAME).write_bytes(state.to_bytes())
        (folder / MODEL_NAME).write_bytes(model.to_bytes())
        (folder / TOKENIZER_NAME).mkdir()
        for name, data in tokenizer.items():
            (folder / name).write_bytes(data)
    return [STATE_NAME, MODEL_NAME, *tokenizer]


def _tokenizer_files(source: Path) -> dict[str, bytes]:
    try:
        with storage_errors(f"reading {source}"):
            paths = sorted(source.iterdir())
            for path in paths:
                if path.is_symlink():  # it may lead outside the folder
                    raise DataIntegrityError(f"{path} is a link; a tokenizer folder holds plain files only")
            return {f"{TOKENIZER_NAME}/{path.name}": path.read_bytes() for path in paths if path.is_file()}
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataIntegrityError(
            f"{error.filename} has gone since the run began, but every checkpoint holds a copy. Nothing was published.",
            hint="restore the corpus' folder tokenizer/, then run again; the run resumes from its last checkpoint",
        ) from error


def _union(gathered: Sequence[Mapping[str, FileDigest]], folder: Path) -> dict[str, FileDigest]:
    """Merge all ranks' files; each must have exactly one writer."""
    files: dict[str, FileDigest] = {}
    for rank, own in enumerate(gathered):
        for name, digest in own.items():
            if name in files:
                raise MegamaskError(f"rank {rank} wrote {name} of {folder}, which another rank wrote too")
            files[name] = digest
    return files


def _refuse_unclaimed(folder: Path, files: Mapping[str, FileDigest]) -> None:
    present = {str((Path(parent) / name).relative_to(folder)) for parent, _, names in os.walk(folder) for name in names}
    if unclaimed := sorted(present - set(files)):
        raise MegamaskError(f"no rank reports that it wrote {unclaimed[0]} of {folder}; nothing was published")
