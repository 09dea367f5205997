"""The MLflow reader of the journal: a side thread that sends what is journalled, and never blocks or fails training.

It follows the journal's files from a remembered place, so an outage, a crash or a lost state delay what MLflow shows
and lose nothing. One MLflow run holds all attempts of a run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megamask.config.schema.tracking import MLflowConfig
from megamask.tracking.journal_reader import read_journal
from megamask.tracking.journal_tail import read_new
from megamask.tracking.mlflow_points import Update, milliseconds, update_of
from megamask.tracking.mlflow_state import SinkState, load_state, save_state

_ENVIRONMENT = {  # set before MLflow is imported, unless the user has set them: fail soon, the journal is patient
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_TRUNCATE_LONG_VALUES": "false",  # a value cut in silence is a wrong value
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
}
_SEND_EVERY_S = 2.0
_LONGEST_PAUSE_S = 30.0
_DRAIN_ATTEMPTS = 2
_DRAIN_PAUSE_S = 0.5
_METRICS_PER_BATCH = 1000
_TAGS_PER_BATCH = 100
_TEXT_CHARACTERS = 6000

_log = logging.getLogger(__name__)


class MLflowSink:
    """Sends a run's journal to MLflow from a daemon thread; every method returns at once but `drain`, which is bounded.

    Args:
        run_dir: the run directory; its run.json gives parameters and tags.
        config: where to send; a null uri is a SQLite file beside the run directories.
        on_incident: told (name, sentence) once per outage, from the sink's thread; Journal.incident fits.
        redact: hides credentials in error texts that others wrote.
    """

    def __init__(
        self,
        run_dir: Path,
        config: MLflowConfig,
        *,
        on_incident: Callable[[str, str], object] | None = None,
        redact: Callable[[str], str] = str,
    ) -> None:
        self._run_dir = run_dir.resolve()
        self._config = config
        self._on_incident = on_incident
        self._redact = redact
        self._session: _Session | None = None
        self._thread: threading.Thread | None = None
        self._is_draining = threading.Event()
        self._is_out = False
        self._has_sent_all = False

    def start(self) -> None:
        """Starts the thread; MLflow is imported there (it takes seconds)."""
        if self._thread is None:
            for name, value in _ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            self._thread = threading.Thread(target=self._run, name="megamask-mlflow", daemon=True)
            self._thread.start()

    def drain(self, timeout_s: float) -> bool:
        """Waits until everything journalled so far is sent, a dead server has been tried twice, or the time is up.

        Returns:
            Whether everything was sent; if not, the next attempt of the run sends the rest.
        """
        if self._thread is None:
            return False
        self._is_draining.set()
        self._thread.join(max(0.0, timeout_s))
        return self._has_sent_all and not self._thread.is_alive()

    def _run(self) -> None:
        failures = last_failures = 0
        while last_failures < _DRAIN_ATTEMPTS:
            is_last = self._is_draining.is_set()  # looked at before sending: what was journalled by then is sent
            if self._send_what_is_new():
                if is_last:
                    self._has_sent_all = True
                    return
                failures = 0
                self._is_draining.wait(_SEND_EVERY_S)
            elif is_last:
                last_failures += 1
                time.sleep(_DRAIN_PAUSE_S)
            else:
                failures += 1
                self._is_draining.wait(min(_LONGEST_PAUSE_S, 2.0 ** min(failures, 10) / 2))

    def _send_what_is_new(self) -> bool:
        try:
            if self._session is None:
                self._session = _connect(self._run_dir, self._config)
            self._session.send_new()
        except Exception as error:  # noqa: BLE001  whatever MLflow, its database or the network raise: training goes on
            self._session = None  # a new connection asks the server again which run this is
            self._report(error)
            return False
        self._is_out = False
        return True

    def _report(self, error: Exception) -> None:
        if self._is_out:
            return
        self._is_out = True
        text = " ".join(str(error).split())
        if self._config.uri is not None:
            text = _without_credentials(text, _resolve(self._config.uri))
        text = text[:500]
        problem = self._redact(
            f"MLflow takes nothing ({type(error).__name__}: {text}). Training goes on, the journal is sent later."
        )
        _log.warning(problem)
        if self._on_incident is not None:
            try:
                self._on_incident("mlflow_outage", problem)
            except Exception as failure:  # noqa: BLE001  the journal may be closed or its disk full; it says so itself
                _log.warning("the outage was not journalled: %r", failure)


class _Session:
    """A connection that knows its MLflow run and what was sent to it."""

    def __init__(self, client: Any, run_dir: Path, state: SinkState) -> None:
        self._client = client
        self._run_dir = run_dir
        self._state = state

    def send_new(self) -> None:
        """Sends every record that was added since the last call, remembering the place after each piece."""
        while True:
            records, position = read_new(self._run_dir, self._state.position)
            if position == self._state.position:
                break
            self._send(update_of(records, self._state.memory))
            self._state.position = position
            save_state(self._run_dir, self._state)
        self._send_configs()

    def describe(self, run_record: dict[str, Any], known_params: dict[str, str]) -> None:
        """Parameters (they cannot be changed, so only those that are missing) and tags from run.json."""
        from mlflow.entities import Param

        params = {key: _text(value) for key, value in run_record.get("identity", {}).items()}
        missing = [Param(key, value) for key, value in params.items() if key not in known_params]
        for begin in range(0, len(missing), _TAGS_PER_BATCH):
            self._client.log_batch(self._state.run_id, params=missing[begin : begin + _TAGS_PER_BATCH])
        tags = {
            "megamask.run_dir": str(self._run_dir),
            "megamask.code_version": _text(run_record.get("code_version")),
            "megamask.tokenizer_digest": _text(run_record.get("tokenizer_digest")),
        }
        tags |= {f"megamask.corpus.{name}": _text(value) for name, value in run_record.get("corpora", {}).items()}
        tags |= {f"megamask.{name}": _text(value) for name, value in run_record.get("extendable", {}).items()}
        self._set_tags(tags)
        save_state(self._run_dir, self._state)

    def _send(self, update: Update) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(*point) for point in update.points]
        for begin in range(0, len(metrics), _METRICS_PER_BATCH):
            self._client.log_batch(self._state.run_id, metrics=metrics[begin : begin + _METRICS_PER_BATCH])
        self._set_tags(update.tags)
        if update.status == "RUNNING":
            self._client.update_run(self._state.run_id, "RUNNING")
        elif update.status is not None:
            self._client.set_terminated(self._state.run_id, update.status, end_time=update.status_time_ms)

    def _set_tags(self, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        entities = [RunTag(key, value) for key, value in tags.items()]
        for begin in range(0, len(entities), _TAGS_PER_BATCH):
            self._client.log_batch(self._state.run_id, tags=entities[begin : begin + _TAGS_PER_BATCH])

    def _send_configs(self) -> None:
        """Each attempt's config, once."""
        for path in sorted((self._run_dir / "config").glob("attempt-*.yaml")):
            if path.name not in self._state.artifacts:
                self._client.log_artifact(self._state.run_id, str(path), "config")
                self._state.artifacts.append(path.name)
                save_state(self._run_dir, self._state)


def _connect(run_dir: Path, config: MLflowConfig) -> _Session:
    """Imports MLflow, opens or creates the store, and finds the run there or creates it."""
    _silence()
    from mlflow import MlflowClient

    run_record = json.loads((run_dir / "run.json").read_bytes())
    uri, artifact_root = _store(run_dir, config)
    client = MlflowClient(tracking_uri=uri)
    experiment_id = _experiment(client, config.experiment, artifact_root)
    state = load_state(run_dir)
    if state is None or state.uri != shown_uri(uri) or state.experiment_id != experiment_id:
        state = None
    run = _living_run(client, state.run_id) if state is not None else None
    if state is None or run is None:  # the file or the run was lost: what the run's tag finds is sent to anew
        run = _find_or_create_run(client, experiment_id, run_dir, str(run_record["run_id"]))
        state = SinkState(uri=shown_uri(uri), experiment_id=experiment_id, run_id=run.info.run_id)
    session = _Session(client, run_dir, state)
    session.describe(run_record, run.data.params)
    return session


def _silence() -> None:
    for name in ("alembic", "mlflow", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(mlflow|alembic|sqlalchemy)(\.|$)")


def _store(run_dir: Path, config: MLflowConfig) -> tuple[str, str | None]:
    """The tracking uri, and the place of artifacts where MLflow does not choose it."""
    if config.uri is not None:
        uri = _resolve(config.uri)
        if not uri:
            raise ValueError(f"tracking.mlflow.uri is {config.uri}, and that variable is not set")
        return uri, None
    database = run_dir.parent / "mlflow.db"
    artifacts = run_dir.parent / "mlartifacts"
    if not database.exists():
        _create_database(database, artifacts)
    return f"sqlite:///{database}", artifacts.as_uri()


def _resolve(uri: str) -> str:
    """A uri, or what the environment holds under the name that `env:NAME` gives (nothing if it is not set)."""
    return os.environ.get(uri[4:], "") if uri.startswith("env:") else uri


def _create_database(database: Path, artifacts: Path) -> None:
    """Makes the schema in a file of its own and shows it whole: runs that start at once cannot meet a half-made one."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    _sweep_unfinished(database)
    temporary = database.with_name(f".{database.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        store = SqlAlchemyStore(f"sqlite:///{temporary}", str(artifacts))
        store.engine.dispose()
        with contextlib.suppress(FileExistsError):  # another run was first: its file holds
            os.link(temporary, database)
    finally:
        temporary.unlink(missing_ok=True)


def _sweep_unfinished(database: Path) -> None:
    """Removes what a process that died while making the schema left behind."""
    for path in database.parent.glob(f".{database.name}.*.tmp*"):
        pid = path.name.removeprefix(f".{database.name}.").partition(".")[0]
        if not (pid.isdecimal() and Path("/proc", pid).exists()):
            path.unlink(missing_ok=True)


def _experiment(client: Any, name: str, artifact_root: str | None) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifact_root))
        except MlflowException:
            experiment = client.get_experiment_by_name(name)  # another run created it in between
            if experiment is None:
                raise
    return str(experiment.experiment_id)


def _living_run(client: Any, run_id: str) -> Any:
    """The run, or None if it was deleted; any other trouble is an outage."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def _find_or_create_run(client: Any, experiment_id: str, run_dir: Path, run_id: str) -> Any:
    found = client.search_runs([experiment_id], filter_string=f"tags.`megamask.run_id` = '{run_id}'", max_results=1)
    if found:
        return found[0]
    first = next(read_journal(run_dir), None)  # MLflow may come late: the run began with its first line
    return client.create_run(
        experiment_id,
        start_time=None if first is None else milliseconds(first["time"]),
        run_name=run_dir.name,
        tags={"megamask.run_id": run_id},
    )


def _text(value: Any) -> str:
    """A parameter or tag as text; one that MLflow would refuse for its length is named by its length."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _TEXT_CHARACTERS else f"({len(text)} characters: see the config artifact)"


def shown_uri(uri: str) -> str:
    """A tracking uri without user, password, query and fragment."""
    parts = urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host, query="", fragment="").geturl() if parts.netloc else uri.partition("?")[0]


def _without_credentials(text: str, uri: str) -> str:
    """An error text that may quote a uri or its parts, with those that may hold a credential hidden."""
    parts = urlsplit(uri)
    for piece in (uri, parts.netloc.rpartition("@")[0], parts.query, parts.fragment):
        if piece:
            text = text.replace(piece, shown_uri(uri) if piece == uri else "***")
    return text
