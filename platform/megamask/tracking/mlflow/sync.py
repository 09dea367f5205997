"""Making MLflow's history of a run complete, at once and not in the background: what `megamask sync` does."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megamask.config.schema.tracking import MLflowConfig
from megamask.errors import CheckpointIntegrityError, MegamaskError, StorageError
from megamask.runs.record import read_run
from megamask.tracking.journal.lines import read_journal
from megamask.tracking.mlflow.client import find_run, is_refusal
from megamask.tracking.mlflow.compare import contradictions, missing_and_foreign
from megamask.tracking.mlflow.points import LOSS, RunStatus, milliseconds
from megamask.tracking.mlflow.session import Session
from megamask.tracking.mlflow.sink import outage_text
from megamask.tracking.mlflow.state import BusyError
from megamask.tracking.mlflow.store import prepare_environment, shown_uri, store_of
from megamask.tracking.records import AttemptEnded, AttemptStarted, Step, read_record

# Only the person who asked waits: a slow server gets more time than during training.
_REQUEST_TIMEOUT_S = 30
_REQUEST_RETRIES = 2
_TURN_TIMEOUT_S = 120.0
_TURN_PAUSE_S = 0.2
_SHOWN = 5
_OTHER_SCHEMA = "out-of-date database schema"  # words of MLflow's error

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, kw_only=True)
class Completed:
    """Content of MLflow after a sync.

    Args:
        mlflow_run_id, experiment_id: MLflow's names.
        num_records_sent: journal records that were sent now.
        num_steps: steps of the journal, each of which is stored.
        num_doubled_steps: steps that are stored more than once, with different times or values.
        num_checkpoints: commits entered.
        status: of the run in MLflow.
    """

    mlflow_run_id: str
    experiment_id: str
    num_records_sent: int
    num_steps: int
    num_doubled_steps: int
    num_checkpoints: int
    status: str


@dataclass(frozen=True, kw_only=True)
class _Journalled:
    """Content of a journal when a sync begins; `open_since_ms` is its last record's time if an attempt has no end."""

    steps: frozenset[int]
    open_since_ms: int | None


def complete(
    run_dir: Path, config: MLflowConfig, *, keeps_foreign_state: bool, ended: Callable[[], RunStatus | None]
) -> Completed:
    """Upload the parts of a run that MLflow is missing, verify, and upload everything again if any is lost.

    Args:
        keeps_foreign_state: tracking/mlflow.json speaks of another server and stays as it is.
        ended: the status of an attempt that left no last line, or None while it may be alive.

    Raises:
        CheckpointIntegrityError: MLflow has a value that contradicts the journal; nothing was sent.
        StorageError: the server does not take it, or another process sends this run and does not get on.
    """
    prepare_environment(timeout_s=_REQUEST_TIMEOUT_S, retries=_REQUEST_RETRIES)
    journalled = _read(run_dir)
    try:
        _refuse_contradictions(run_dir, config)
        session = _in_turn(lambda: Session.open(run_dir, config, keeps_foreign_state=keeps_foreign_state), run_dir)
        _in_turn(session.send_new, run_dir)
        stored = _stored_steps(session)
        if not journalled.steps <= stored.keys():  # the server lost what it had taken
            _in_turn(session.forget, run_dir)
            _in_turn(session.send_new, run_dir)
            stored = _stored_steps(session)
        status = ended() if journalled.open_since_ms is not None else None
        if status is not None and journalled.open_since_ms is not None:
            since = journalled.open_since_ms
            _in_turn(lambda: session.end(status, since), run_dir)
        answer = Completed(
            mlflow_run_id=session.run.run_id,
            experiment_id=session.run.experiment_id,
            num_records_sent=session.num_sent,
            num_steps=len(journalled.steps),
            num_doubled_steps=sum(count > 1 for count in stored.values()),
            num_checkpoints=_in_turn(session.count_checkpoints, run_dir),
            status=session.run.status(),
        )
    except Exception as error:
        if isinstance(error, MegamaskError) or not is_refusal(error):
            raise
        raise _refused(error, run_dir, config) from error
    if missing := journalled.steps - stored.keys():
        raise StorageError(
            f"MLflow at {_shown(run_dir, config)} took the journal of {run_dir} twice and still misses "
            f"{len(missing)} of {len(journalled.steps)} steps, the first of them step {min(missing)}.",
            hint="look at the server's log and its disk, then run `megamask sync` again",
        )
    return answer


def compare(run_dir: Path, config: MLflowConfig) -> list[str]:
    """Return every difference between a run's records and MLflow; reads only.

    Raises:
        StorageError: the server does not answer.
    """
    prepare_environment(timeout_s=_REQUEST_TIMEOUT_S, retries=_REQUEST_RETRIES)
    record = read_run(run_dir)
    try:
        run = find_run(run_dir, config, run_id=record.run_id)
        if run is None:
            return [f"{_shown(run_dir, config)} has no run with the tag megamask.run_id = {record.run_id}"]
        return [*contradictions(run, run_dir, record.content), *missing_and_foreign(run, run_dir)]
    except Exception as error:
        if isinstance(error, MegamaskError) or not is_refusal(error):
            raise
        raise _refused(error, run_dir, config) from error


def _refuse_contradictions(run_dir: Path, config: MLflowConfig) -> None:
    """Compare what MLflow has of the run with the journal, before anything is written.

    Raises:
        CheckpointIntegrityError: a parameter or a point contradicts; nothing was sent.
    """
    record = read_run(run_dir)
    run = find_run(run_dir, config, run_id=record.run_id)
    found = [] if run is None else list(contradictions(run, run_dir, record.content))
    if found:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise CheckpointIntegrityError(
            f"MLflow at {_shown(run_dir, config)} contradicts {run_dir}: {'; '.join(found[:_SHOWN])}{more}. "
            "Nothing was sent.",
            hint="`megamask verify run RUN --against-mlflow` lists every difference; one of the two was changed",
        )


def _read(run_dir: Path) -> _Journalled:
    steps: set[int] = set()
    is_open, last = False, None
    for line in read_journal(run_dir):
        last = line["time"]
        match record := read_record(line):
            case Step():
                steps.add(record.step)
            case AttemptStarted() | AttemptEnded():
                is_open = isinstance(record, AttemptStarted)
    return _Journalled(
        steps=frozenset(steps), open_since_ms=milliseconds(last) if is_open and last is not None else None
    )


def _stored_steps(session: Session) -> Counter[int]:
    return Counter(point.step for point in set(session.run.history(LOSS)))


def _in_turn(action: Callable[[], _Answer], run_dir: Path) -> _Answer:
    """The action's answer, waiting for the training that may be sending the same run just now."""
    deadline = time.monotonic() + _TURN_TIMEOUT_S
    while True:
        try:
            return action()
        except BusyError as error:
            if time.monotonic() > deadline:
                raise StorageError(
                    f"another process has been sending the journal of {run_dir} for {_TURN_TIMEOUT_S:g} s "
                    f"({error}). What it sent stays.",
                    hint="see whether the training, or another `megamask sync`, hangs, then run this again",
                ) from error
            time.sleep(_TURN_PAUSE_S)


def _refused(error: Exception, run_dir: Path, config: MLflowConfig) -> StorageError:
    return StorageError(
        f"MLflow at {_shown(run_dir, config)} does not take the journal of {run_dir} "
        f"({type(error).__name__}: {outage_text(error, run_dir, config)}). What it took stays; the journal has all.",
        hint=hint_of(error),
    )


def hint_of(error: Exception) -> str:
    """Return what to do about a refusal: a database of another MLflow is not started but migrated."""
    if _OTHER_SCHEMA in str(error):
        return "copy the database, run `mlflow db upgrade` on its URI, then run `megamask sync` again"
    return "start the server, or name another one with --uri, then run `megamask sync` again"


def _shown(run_dir: Path, config: MLflowConfig) -> str:
    return shown_uri(store_of(run_dir, config).uri)
