"""run.json: what a run is, written once; every later attempt must be the same run."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megamask.checkpoint.commit import LAWS, load_commit
from megamask.checkpoint.contents import read_state
from megamask.checkpoint.names import checkpoints_folder, parse_folder_name
from megamask.checkpoint.ownership import Owner
from megamask.checkpoint.reader import candidates, has_commit
from megamask.config.dump import to_yaml
from megamask.config.identity import compare_identity, extendable_fields, identity_fields
from megamask.config.schema.roots import TrainConfig
from megamask.data.manifest import open_corpus
from megamask.errors import CheckpointIntegrityError, StorageError, UsageError
from megamask.provenance.redaction import redact_values
from megamask.resilience.status import read_status
from megamask.storage.durable import create_exclusive, make_folders, storage_errors, write_atomic
from megamask.storage.hashing import sha256_bytes
from megamask.tracking.journal_reader import journal_files

FORMAT = "megamask-run"
VERSION = 1
_OWN_DIGEST = "self_sha256"
_OBJECTS = ("identity", "extendable", "corpora", "laws")
_FOLDERS_OF_A_RUN = {"attempts", "checkpoints", "journal"}


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The content of run.json and where it stands."""

    path: Path
    run_id: str
    content: Mapping[str, Any]
    is_new: bool

    @property
    def recorded_steps(self) -> int:
        """training.steps when the run began."""
        return int(self.content["extendable"]["training.steps"])

    @property
    def owner(self) -> Owner:
        """Whom every checkpoint of this run must name."""
        return Owner(
            run_id=self.run_id, seed=int(self.content["identity"]["run.seed"]), corpora=self.content["corpora"]
        )


def open_run(
    run_dir: Path,
    config: TrainConfig,
    *,
    corpora: Mapping[str, str],
    tokenizer_digest: str,
    code_version: str,
) -> RunRecord:
    """Writes run.json in an empty or new folder, or checks that the one there describes this very run.

    Args:
        corpora: corpus id by name.

    Raises:
        UsageError: the folder holds something else, a run of another identity, or one under other laws.
        CheckpointIntegrityError: run.json is damaged, or the folder holds a run that has lost it.
        StorageError: the folder cannot be written.
    """
    path = run_dir / "run.json"
    if not path.exists():
        _create(path, config, corpora, tokenizer_digest, code_version)
        return RunRecord(path=path, is_new=True, **_read(path))
    record = RunRecord(path=path, is_new=False, **_read(path))
    check_same_run(record, config, corpora=corpora, tokenizer_digest=tokenizer_digest)
    return record


def _create(
    path: Path, config: TrainConfig, corpora: Mapping[str, str], tokenizer_digest: str, code_version: str
) -> None:
    run_dir = path.parent
    created = _make_folder(run_dir)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "run_id": secrets.token_hex(16),
        "created": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "identity": identity_fields(config),
        "extendable": extendable_fields(config),
        "corpora": dict(corpora),
        "tokenizer_digest": tokenizer_digest,
        "code_version": code_version,
        "laws": LAWS,
        "parent_checkpoint": None,
    }
    try:
        create_exclusive(path, _to_bytes({**content, _OWN_DIGEST: _digest(content)}))
    except FileExistsError:
        return  # another attempt was first; the claim decides between the two
    except StorageError:
        for folder in created:
            with contextlib.suppress(OSError):  # somebody else uses it by now
                folder.rmdir()
        raise


def _make_folder(run_dir: Path) -> list[Path]:
    """Creates the run directory where it is missing and returns the folders that are new, the innermost first.

    Raises:
        UsageError: it cannot be a folder, or holds something that is no run.
        CheckpointIntegrityError: it holds a run that has lost its run.json.
    """
    with storage_errors(f"creating {run_dir}"):
        places = (run_dir, *run_dir.absolute().parents)
        missing = [folder for folder in places if not folder.exists()]
        standing = places[len(missing)]
        if not standing.is_dir():
            where = "is" if standing == run_dir else f"lies below {standing}, which is"
            raise UsageError(
                f"the run directory {run_dir} {where} not a folder. Nothing was started.",
                hint="change run.output_dir or run.name",
            )
        make_folders(run_dir)
        strangers = sorted(entry.name for entry in run_dir.iterdir() if not entry.name.startswith(".run.json."))
    if "run.json" in strangers:
        return missing
    _refuse_lost_record(run_dir)
    if strangers:
        raise UsageError(
            f"{run_dir} is not empty and has no run.json (it holds {', '.join(strangers[:5])}). Nothing was started.",
            hint="choose another run.name or run.output_dir",
        )
    return missing


def read_run(run_dir: Path) -> RunRecord:
    """The run.json of a run directory.

    Raises:
        UsageError: the folder is no run directory, or a newer megamask wrote it.
        CheckpointIntegrityError: it is damaged, or the folder holds a run that has lost it.
    """
    path = run_dir / "run.json"
    if not path.is_file():
        _refuse_lost_record(run_dir)
        what = "has no run.json" if run_dir.is_dir() else "is not a folder"
        raise UsageError(
            f"{run_dir} is not a run directory: it {what}. Nothing was read.",
            hint="a run directory is <run.output_dir>/<run.name>",
        )
    return RunRecord(path=path, is_new=False, **_read(path))


def _refuse_lost_record(run_dir: Path) -> None:
    """A folder with a run's own folders and without run.json is a run that lost it, not a folder of something else."""
    path = run_dir / "run.json"
    if path.exists() or not any((run_dir / name).is_dir() for name in _FOLDERS_OF_A_RUN):
        return
    raise CheckpointIntegrityError(
        f"{path} is missing, but {run_dir} holds what a run writes. Nothing was started.",
        hint="restore run.json from a copy, or choose another run.name",
    )


def _read(path: Path) -> dict[str, Any]:
    with storage_errors(f"reading {path}"):
        data = path.read_bytes()
    try:
        content = json.loads(data)
        run_id, version = str(content["run_id"]), int(content["version"])
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}")
        _check_bytes(content, data)
        for name in _OBJECTS:
            if not isinstance(content[name], dict):
                raise ValueError(f"{name} is not an object")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointIntegrityError(
            f"{path} is damaged and cannot be read as a run's record ({error}). Nothing was started.",
            hint="restore the file from a backup, or choose another run.name",
        ) from error
    if version > VERSION:
        raise UsageError(
            f"{path} has version {version}; this megamask reads up to {VERSION}.", hint="use a newer megamask"
        )
    return {"run_id": run_id, "content": content}


def _check_bytes(content: Mapping[str, Any], data: bytes) -> None:
    """Refuses every byte that was not written so; a run begun before run.json had a digest is taken as it is."""
    if _OWN_DIGEST not in content:
        return
    rest = {name: value for name, value in content.items() if name != _OWN_DIGEST}
    if content[_OWN_DIGEST] != _digest(rest) or _to_bytes(content) != data:
        raise ValueError(f"it does not have the sha256 that it states under {_OWN_DIGEST}")


def _to_bytes(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2, sort_keys=True).encode() + b"\n"


def _digest(content: Mapping[str, Any]) -> str:
    return sha256_bytes(_to_bytes(content))


def check_same_run(
    record: RunRecord, config: TrainConfig, *, corpora: Mapping[str, str], tokenizer_digest: str
) -> None:
    """Refuses to resume a run under another identity, other corpora, another tokenizer or other laws.

    Raises:
        UsageError: names each field that differs, with the stored and the given value.
    """
    content = record.content
    compare_identity(dict(content["identity"]), config, where=str(record.path))
    if content["laws"] != LAWS:
        raise UsageError(
            f"{record.path} was written under the laws {content['laws']}; this megamask trains under {LAWS}. "
            "Nothing was started.",
            hint="resume with the version of megamask that started the run",
        )
    for name, corpus_id in corpora.items():
        stored = content["corpora"].get(name)
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


def store_attempt_config(run_dir: Path, attempt: int, config: TrainConfig) -> Path:
    """Writes the resolved config of an attempt, redacted, as config/attempt-NNNN.yaml and returns its path."""
    path = run_dir / "config" / f"attempt-{attempt:04d}.yaml"
    with storage_errors(f"creating {path.parent}"):
        make_folders(path.parent)
    write_atomic(path, to_yaml(config, hide=redact_values).encode())
    return path


def last_attempt_of(run_dir: Path) -> int:
    """The highest attempt that left a journal file or a folder of a checkpoint, 0 for none; claims may be lost."""
    folder = checkpoints_folder(run_dir)
    with storage_errors(f"listing {run_dir}"):
        places = [parse_folder_name(path.name) for path in folder.iterdir()] if folder.is_dir() else []
        journalled = [file.attempt for file in journal_files(run_dir)]
    return max([*journalled, *(place[1] for place in places if place is not None)], default=0)


def run_path(output_dir: str, name: str) -> Path:
    """The run directory of run.output_dir and run.name."""
    return Path(output_dir) / name


def is_complete(run_dir: Path, config: TrainConfig) -> bool:
    """Whether this very run has already done all its steps, so that there is nothing to start.

    Raises:
        UsageError: the folder holds a run of another identity.
    """
    if not (run_dir / "run.json").exists():
        return False
    record, status = read_run(run_dir), read_status(run_dir)
    compare_identity(dict(record.content["identity"]), config, where=str(record.path))
    if status is None or status.phase != "done" or status.step != config.training.steps:
        return False
    corpora = {
        name: open_corpus(Path(folder), f"data.corpora.{name}").corpus_id
        for name, folder in config.data.corpora.items()
    }
    return corpora == record.content["corpora"] and any(has_commit(folder) for folder in candidates(run_dir))


def recorded_schedule(record: RunRecord) -> tuple[int, int]:
    """training.steps as last recorded, and the steps taken under it: of the newest checkpoint, else of run.json.

    Only for refusing what is impossible before anything starts; a checkpoint that does not read is passed over here
    and dealt with when it is loaded.

    Raises:
        UsageError: the newest checkpoint that reads is of another run.
    """
    for folder in candidates(record.path.parent):
        commit, state = None, None
        with contextlib.suppress(CheckpointIntegrityError, UsageError):
            commit = load_commit(folder)
            state = read_state(folder)
        if commit is not None:
            record.owner.refuse_foreign(commit)
        if state is not None:
            return int(state.schedule.get("training_steps", record.recorded_steps)), state.step
    return record.recorded_steps, 0
