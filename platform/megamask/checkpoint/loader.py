"""Loading on resume: rank 0 picks, every file is verified by exactly one rank, a damaged one is passed over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megamask.checkpoint.agreement import CheckpointEngine, agree, captured, on_main
from megamask.checkpoint.commit import Commit, load_commit, parse_commit, read_commit_bytes
from megamask.checkpoint.contents import (
    ModelDocument,
    TrainerState,
    check_state,
    read_model,
    read_state,
    refuse_other_laws,
)
from megamask.checkpoint.integrity import damaged, link_problems, problems, share
from megamask.checkpoint.names import MODEL_NAME
from megamask.checkpoint.ownership import Owner
from megamask.checkpoint.reader import candidates, incident, none_left
from megamask.checkpoint.retention import mark_damaged, unmark_damaged
from megamask.checkpoint.state_files import refuse_old_state
from megamask.errors import CheckpointIntegrityError, UsageError
from megamask.runs.layout import checkpoints_folder
from megamask.storage.fault_points import reached
from megamask.storage.hashing import sha256_bytes

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Position of a run when an attempt begins.

    Args:
        commit, state: of the checkpoint the engine now holds; both None on a fresh start.
        incidents: one record for each newer checkpoint that did not verify, for the journal.
    """

    commit: Commit | None
    state: TrainerState | None
    incidents: list[dict[str, Any]]


def load(engine: CheckpointEngine, run_dir: Path, *, model: ModelDocument, owner: Owner) -> Loaded:
    """Restore the engine from the newest checkpoint of a run that verifies; collective.

    Those passed over are marked as damaged, so that retention does not count them, in later attempts neither.

    Args:
        model: what this attempt is building; a checkpoint of another model is refused.
        owner: this run; a checkpoint of another run is refused.

    Returns: the same on every rank; `commit` is None if the run has no checkpoint at all.
    Raises:
        CheckpointIntegrityError: checkpoints exist and none verifies.
        StorageError: the storage refuses to read one: it may be intact, so no older one is loaded instead.
        UsageError: the checkpoint is of another run or model, or a newer megamask wrote it.
    """
    folders = on_main(engine, lambda: candidates(run_dir))
    incidents: list[dict[str, Any]] = []
    for folder in folders:
        try:
            commit, state = _verify_together(engine, folder, model, owner)
        except CheckpointIntegrityError as error:
            incidents.append(incident(folder, error))
            continue
        passed_over = [checkpoints_folder(run_dir) / record["checkpoint"] for record in incidents]
        on_main(engine, lambda: _mark(passed_over, verified=folder))  # noqa: B023  called before the loop goes on
        _load_engine(engine, folder)
        return Loaded(commit=commit, state=state, incidents=incidents)
    if incidents:
        raise none_left(run_dir, incidents)
    return Loaded(commit=None, state=None, incidents=[])


def _mark(passed_over: list[Path], *, verified: Path) -> None:
    for folder in passed_over:
        mark_damaged(folder)
    unmark_damaged(verified)


def _verify_together(
    engine: CheckpointEngine, folder: Path, model: ModelDocument, owner: Owner
) -> tuple[Commit, TrainerState]:
    """Every rank raises the same error, or returns the same verified commit and state."""
    step, digest = on_main(engine, lambda: _pick(folder))
    commit = _on_all(engine, lambda: _same_commit(folder, step, digest))
    _on_all(engine, lambda: owner.refuse_foreign(commit))
    mine = share(commit, engine.mesh.rank, engine.mesh.world_size)
    everything = engine.gather_objects(_on_all(engine, lambda: problems(commit, mine)))
    on_main(engine, lambda: _refuse_damaged(folder, everything))
    return commit, _on_all(engine, lambda: _read_documents(commit, model))


def _load_engine(engine: CheckpointEngine, folder: Path) -> None:
    reached("checkpoint.verified")
    _on_all(engine, lambda: engine.load_state(folder))
    reached("checkpoint.restored")


def _on_all(engine: CheckpointEngine, action: Callable[[], Result]) -> Result:
    failures: list[BaseException] = []
    results: list[Result] = []
    with captured(failures):
        results.append(action())
    agree(engine, failures)
    return results[0]


def _pick(folder: Path) -> tuple[int, str]:
    commit = load_commit(folder)
    refuse_old_state(commit)
    if links := link_problems(folder):
        raise damaged(folder, links)
    return commit.step, commit.digest


def _same_commit(folder: Path, step: int, digest: str) -> Commit:
    """This rank's own view of the COMMIT.json that rank 0 picked."""
    data = read_commit_bytes(folder)
    if sha256_bytes(data) != digest:
        raise CheckpointIntegrityError(
            f"{folder}: COMMIT.json of step {step} reads differently on two ranks. Nothing was loaded from it.",
            hint="give all nodes the same file system",
        )
    return parse_commit(data, folder)


def _refuse_damaged(folder: Path, everything: list[list[str]]) -> None:
    if found := [text for part in everything for text in part]:
        raise damaged(folder, found)


def _read_documents(commit: Commit, model: ModelDocument) -> TrainerState:
    path = commit.folder / MODEL_NAME
    refuse_other_laws(commit.laws, path)
    stored, ours = read_model(commit.folder).to_json(), model.to_json()
    if stored != ours:
        flat_stored, flat_ours = _flat(stored), _flat(ours)
        names = sorted(name for name in flat_stored | flat_ours if flat_stored.get(name) != flat_ours.get(name))
        differences = "; ".join(
            f"{name} is {flat_stored.get(name)} there, {flat_ours.get(name)} here" for name in names
        )
        raise UsageError(
            f"{path} describes another model: {differences}. Nothing was loaded.",
            hint="resume with the run's own model, objective and corpus, or choose another run.name",
        )
    state = read_state(commit.folder)
    check_state(commit, state)
    return state


def _flat(document: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in document.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": entry for key, entry in value.items()}
        else:
            flat[name] = value
    return flat
