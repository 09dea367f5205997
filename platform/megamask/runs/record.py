"""run.json: the identity of a run, written once; every later attempt must match it."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamask.errors import CheckpointIntegrityError, StorageError, UsageError
from megamask.runs.laws import LAWS
from megamask.runs.layout import FOLDERS_OF_A_RUN, RUN_RECORD, record_path
from megamask.storage.documents import DocumentKind, OwnDigest, decode_document, encode_document
from megamask.storage.durable import create_exclusive, make_folders, storage_errors
from megamask.storage.hashing import sha256_bytes

if TYPE_CHECKING:  # `megamask status` reads records and needs no schema
    from megamask.config.schema.roots import TrainConfig

_KIND = DocumentKind(
    format="megamask-run",
    version=1,
    is_canonical=False,
    own_digest=OwnDigest.OPTIONAL,  # runs begun before there was one have none; the journal names the file's sha256
    damage=CheckpointIntegrityError,
    damage_hint="restore the file from a backup, or choose another run.name",
)
_OBJECTS = ("identity", "extendable", "corpora", "laws")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The content of run.json, its path and the sha256 of its bytes."""

    path: Path
    run_id: str
    content: Mapping[str, Any]
    sha256: str
    is_new: bool

    @property
    def recorded_steps(self) -> int:
        """training.steps as the run began with it."""
        return int(self.content["extendable"]["training.steps"])


def open_run(
    run_dir: Path,
    config: TrainConfig,
    *,
    corpora: Mapping[str, str],
    tokenizer_digest: str,
    code_version: str,
    parent_checkpoint: Mapping[str, Any] | None = None,
) -> RunRecord:
    """Write run.json into an empty or new folder, or check that the existing one describes this run.

    Args:
        corpora: corpus id by name.
        parent_checkpoint: what the first weights were read from; None where they were drawn.

    Raises:
        UsageError: the folder holds something else, a run of another identity, or one under other laws.
        CheckpointIntegrityError: run.json is damaged, or the folder holds a run that has lost it.
        StorageError: the folder cannot be written.
    """
    path = record_path(run_dir)
    if not path.exists():
        _create(path, config, corpora, tokenizer_digest, code_version, parent_checkpoint)
        return _read(path, is_new=True)
    record = _read(path, is_new=False)
    check_same_run(record, config, corpora=corpora, tokenizer_digest=tokenizer_digest)
    return record


def _create(
    path: Path,
    config: TrainConfig,
    corpora: Mapping[str, str],
    tokenizer_digest: str,
    code_version: str,
    parent_checkpoint: Mapping[str, Any] | None,
) -> None:
    from megamask.config.identity import extendable_fields, identity_fields

    run_dir = path.parent
    created = _make_folder(run_dir)
    content = {
        "run_id": secrets.token_hex(16),
        "created": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "identity": identity_fields(config),
        "extendable": extendable_fields(config),
        "corpora": dict(corpora),
        "tokenizer_digest": tokenizer_digest,
        "code_version": code_version,
        "laws": LAWS,
        "parent_checkpoint": None if parent_checkpoint is None else dict(parent_checkpoint),
    }
    try:
        create_exclusive(path, encode_document(_KIND, content))
    except FileExistsError:
        return  # another attempt was first; the claim decides between the two
    except StorageError:
        for folder in created:
            with contextlib.suppress(OSError):  # another process uses it by now
                folder.rmdir()
        raise


def _make_folder(run_dir: Path) -> list[Path]:
    """Create the run directory if it is missing and return the new folders, the innermost first.

    Raises:
        UsageError: it cannot be a folder, or holds files that do not belong to a run.
        CheckpointIntegrityError: it holds a run that has lost its run.json.
    """
    with storage_errors(f"creating {run_dir}"):
        places = (run_dir, *run_dir.absolute().parents)
        missing = [folder for folder in places if not folder.exists()]
        existing = places[len(missing)]
        if not existing.is_dir():
            where = "is" if existing == run_dir else f"is below {existing}, which is"
            raise UsageError(
                f"the run directory {run_dir} {where} not a folder. Nothing was started.",
                hint="change run.output_dir or run.name",
            )
        make_folders(run_dir)
        strangers = sorted(entry.name for entry in run_dir.iterdir() if not entry.name.startswith(".run.json."))
    if RUN_RECORD in strangers:
        return missing
    _refuse_lost_record(run_dir)
    if strangers:
        raise UsageError(
            f"{run_dir} is not empty and has no run.json (it holds {', '.join(strangers[:5])}). Nothing was started.",
            hint="choose another run.name or run.output_dir",
        )
    return missing


def read_run(run_dir: Path) -> RunRecord:
    """Read the run.json of a run directory.

    Raises:
        UsageError: the folder is not a run directory, or a newer megamask wrote it.
        CheckpointIntegrityError: it is damaged, or the folder holds a run that has lost it.
    """
    path = record_path(run_dir)
    if not path.is_file():
        _refuse_lost_record(run_dir)
        what = "has no run.json" if run_dir.is_dir() else "is not a folder"
        raise UsageError(
            f"{run_dir} is not a run directory: it {what}. Nothing was read.",
            hint="a run directory is <run.output_dir>/<run.name>",
        )
    return _read(path, is_new=False)


def _refuse_lost_record(run_dir: Path) -> None:
    """Refuse a folder with a run's own folders and without run.json: a run that lost its record."""
    path = record_path(run_dir)
    if path.exists() or not any((run_dir / name).is_dir() for name in FOLDERS_OF_A_RUN):
        return
    raise CheckpointIntegrityError(
        f"{path} is missing, but {run_dir} holds what a run writes. Nothing was started.",
        hint="restore run.json from a copy, or choose another run.name",
    )


def _read(path: Path, *, is_new: bool) -> RunRecord:
    with storage_errors(f"reading {path}"):
        data = path.read_bytes()
    content = decode_document(_KIND, data, path)
    try:
        run_id = str(content["run_id"])
        for name in _OBJECTS:
            if not isinstance(content[name], dict):
                raise ValueError(f"{name} is not an object")
    except (ValueError, KeyError) as error:
        raise _KIND.damaged(path, f"lacks or misstates a field ({error})") from error
    return RunRecord(path=path, run_id=run_id, content=content, sha256=sha256_bytes(data), is_new=is_new)


def check_same_run(
    record: RunRecord, config: TrainConfig, *, corpora: Mapping[str, str], tokenizer_digest: str
) -> None:
    """Refuse to resume a run under another identity, other corpora, another tokenizer or other laws.

    Raises:
        UsageError: names each field that differs, with the stored and the given value.
    """
    from megamask.config.identity import compare_identity

    content = record.content
    compare_identity(dict(content["identity"]), config, where=str(record.path))
    if content["laws"] != LAWS:
        raise UsageError(
            f"{record.path} was written under the laws {content['laws']}; this megamask trains under {LAWS}. "
            "Nothing was started.",
            hint="resume with the version of megamask that started the run",
        )
    for name, corpus_id in corpora.items():
        stored = content["corpora"].get(name, corpus_id)  # a name that was added later
        if stored != corpus_id:
            raise UsageError(
                f"data.corpora.{name} is corpus {corpus_id}, but {record.path} was started with {stored}. "
                "Nothing was started.",
                hint="point data.corpora at the same corpus, or choose another run.name",
            )
    if content["tokenizer_digest"] != tokenizer_digest:
        raise UsageError(
            f"the corpus' tokenizer is {tokenizer_digest}, but {record.path} was started with "
            f"{content['tokenizer_digest']}. Nothing was started."
        )
