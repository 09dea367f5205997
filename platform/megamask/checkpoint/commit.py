"""The commit protocol: COMMIT.json, created exclusively and last, is the only act that makes a checkpoint visible.

Everything here is plain files; no process group, no torch. Who calls what, in which order, is in `saver.py`.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megamask.checkpoint.names import (
    COMMIT_NAME,
    LATEST_NAME,
    folder_name,
    is_plain_name,
    parse_folder_name,
)
from megamask.errors import CheckpointIntegrityError, MegamaskError, StorageError
from megamask.runs.laws import LAWS
from megamask.runs.layout import checkpoints_folder
from megamask.storage.documents import (
    DocumentKind,
    OwnDigest,
    decode_document,
    encode_document,
    read_document_bytes,
)
from megamask.storage.durable import (
    create_exclusive,
    make_folders,
    storage_errors,
    write_atomic,
)
from megamask.storage.fault_points import reached
from megamask.storage.hashing import sha256_bytes

COMMIT = DocumentKind(
    format="megamask-checkpoint",
    version=2,  # 1: the state was files of torch.distributed.checkpoint
    own_digest=OwnDigest.REQUIRED,
    damage=CheckpointIntegrityError,
    damage_hint="restore the folder from a copy, or use another checkpoint",
    max_bytes=1 << 28,
)
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """Size in bytes and lower-case hex sha256 of one file."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Commit:
    """Content of a COMMIT.json.

    Args:
        folder: the checkpoint folder it was read from.
        digest: sha256 of COMMIT.json's bytes; it names the commit.
        files: relative name -> size and digest of every file of the checkpoint, COMMIT.json excluded.
        parent: digest of the commit that this attempt's lineage had before, or None for the first.
        state: scalars of the trainer (integers and strings).
        corpora: corpus name -> corpus id.
        journal: sequence number and sha256 of the last journal line before the commit.
        evaluation: the bound measured at this very step, numbers as text, or None.
        run_sha256: of the bytes of run.json; None in commits of a version that did not record it.
    """

    folder: Path
    digest: str
    step: int
    attempt: int
    run_id: str
    files: Mapping[str, FileDigest]
    parent: str | None
    state: Mapping[str, Any]
    corpora: Mapping[str, str]
    laws: Mapping[str, int]
    journal: Mapping[str, Any]
    evaluation: Mapping[str, str] | None = None
    run_sha256: str | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(entry.num_bytes for entry in self.files.values())

    @property
    def bound(self) -> float | None:
        """Nats per token, measured at this commit's own step; None if it was not."""
        bound = (self.evaluation or {}).get("nelbo_nats_per_token")
        return None if bound is None else float(bound)

    @property
    def bound_from_step(self) -> int:
        """First step whose bounds are of the same kind as this one; bounds of different kinds are not compared."""
        return int(float((self.evaluation or {}).get("bound_from_step", "1")))


@dataclass(frozen=True, kw_only=True)
class CommitFields:
    """The fields of a COMMIT.json that the trainer knows and the protocol only carries."""

    run_id: str
    parent: str | None = None
    state: Mapping[str, Any] = field(default_factory=dict)
    corpora: Mapping[str, str] = field(default_factory=dict)
    journal: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, str] | None = None
    run_sha256: str | None = None
    laws: Mapping[str, int] = field(default_factory=lambda: dict(LAWS))


def begin(run_dir: Path, step: int, attempt: int) -> Path:
    """Make the empty folder of a checkpoint that is not visible yet.

    What an earlier, failed save of the same attempt and step left there is removed first.

    Raises:
        MegamaskError: this attempt has already committed this step (the caller's bug).
        StorageError: the storage refused.
    """
    folder = checkpoints_folder(run_dir) / folder_name(step, attempt)
    if (folder / COMMIT_NAME).exists():
        raise MegamaskError(f"{folder} is committed already; a commit is never written twice. Nothing was changed.")
    with storage_errors(f"making {folder}"):
        if folder.exists():
            shutil.rmtree(folder)
        make_folders(folder.parent)
        folder.mkdir()  # its entry is flushed with its content, before COMMIT.json is created
    reached("checkpoint.begun")
    return folder


def publish(folder: Path, files: Mapping[str, FileDigest], fields: CommitFields) -> Commit:
    """Make a checkpoint visible; every file in `files` must be flushed and hashed before.

    Raises:
        FileExistsError: the folder has a COMMIT.json already; it is not touched.
        StorageError: the storage refused; the checkpoint stays invisible.
    """
    place = parse_folder_name(folder.name)
    if place is None:
        raise MegamaskError(f"{folder} is not the folder of a checkpoint; nothing was published")
    commit = write_commit(folder, place, files, fields)
    with contextlib.suppress(StorageError):  # only a hint: the commit is valid without it
        write_atomic(folder.parent / LATEST_NAME, f"{folder.name}\n".encode())
    return commit


def write_commit(folder: Path, place: tuple[int, int], files: Mapping[str, FileDigest], fields: CommitFields) -> Commit:
    """Create COMMIT.json, which makes a folder a checkpoint.

    Args:
        place: step and attempt.

    Raises: as `publish`.
    """
    content: dict[str, Any] = {
        "step": place[0],
        "attempt": place[1],
        "run_id": fields.run_id,
        "files": {name: {"bytes": entry.num_bytes, "sha256": entry.sha256} for name, entry in files.items()},
        "parent": fields.parent,
        "state": dict(fields.state),
        "corpora": dict(fields.corpora),
        "laws": dict(fields.laws),
        "journal": dict(fields.journal),
    }
    if fields.evaluation is not None:
        content["evaluation"] = dict(fields.evaluation)
    if fields.run_sha256 is not None:
        content["run_sha256"] = fields.run_sha256
    data = encode_document(COMMIT, content)
    commit = parse_commit(data, folder)  # what is written is what a reader accepts
    create_exclusive(folder / COMMIT_NAME, data)
    return commit


def read_commit_bytes(folder: Path) -> bytes:
    """Return the bytes of a folder's COMMIT.json.

    Raises:
        CheckpointIntegrityError: it is missing, a link, not a file or absurdly large.
        StorageError: the storage does not let it be read.
    """
    return read_document_bytes(COMMIT, folder / COMMIT_NAME)


def load_commit(folder: Path) -> Commit:
    """Read and check a folder's COMMIT.json; the files it names are not looked at.

    Raises:
        CheckpointIntegrityError: it is damaged.
        StorageError: the storage does not let it be read.
        UsageError: a newer megamask wrote it.
    """
    return parse_commit(read_commit_bytes(folder), folder)


def parse_commit(data: bytes, folder: Path) -> Commit:
    """A Commit from the bytes of COMMIT.json; `folder` is where its files are. Raises as `load_commit`."""
    path = folder / COMMIT_NAME
    document = decode_document(COMMIT, data, path)
    try:
        commit = _from_document(document, folder, sha256_bytes(data))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise COMMIT.damaged(path, f"lacks or misstates a field ({error})") from error
    place = parse_folder_name(folder.name)
    if place is not None and place != (commit.step, commit.attempt):
        raise COMMIT.damaged(path, f"is of step {commit.step}, attempt {commit.attempt}, unlike its folder's name")
    return commit


def _from_document(document: dict[str, Any], folder: Path, digest: str) -> Commit:
    files = {
        name: FileDigest(num_bytes=entry["bytes"], sha256=entry["sha256"]) for name, entry in document["files"].items()
    }
    for name, entry in files.items():
        if not is_plain_name(name) or name == COMMIT_NAME:
            raise ValueError(f"file name {name!r} is not allowed")
        if not _is_count(entry.num_bytes) or not _is_digest(entry.sha256):
            raise ValueError(f"size or sha256 of {name!r}")
    if not files or not _is_count(document["step"]) or not _is_count(document["attempt"]):
        raise ValueError("files, step or attempt")
    if not isinstance(document["run_id"], str) or not (document["parent"] is None or _is_digest(document["parent"])):
        raise ValueError("run_id or parent")
    for name in ("state", "corpora", "laws", "journal"):
        if not isinstance(document[name], dict):
            raise ValueError(name)
    evaluation = document.get("evaluation")
    if evaluation is not None and not (isinstance(evaluation, dict) and _are_numbers(evaluation.values())):
        raise ValueError("evaluation")
    carried = {
        key: document[key] for key in ("step", "attempt", "run_id", "parent", "state", "corpora", "laws", "journal")
    }
    run_sha256 = document.get("run_sha256")
    if run_sha256 is not None and not _is_digest(run_sha256):
        raise ValueError("run_sha256")
    carried |= {"evaluation": evaluation, "run_sha256": run_sha256}
    return Commit(folder=folder, digest=digest, files=files, **carried)


def _are_numbers(values: Iterable[object]) -> bool:
    """Return whether each is text that `float` reads."""
    for value in values:
        if not isinstance(value, str):
            return False
        float(value)
    return True


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= _HEX
