"""The one door to MLflow: a run there, and what can be sent to it.

Every request may be repeated: a server that took one and answered too late gets it again. What MLflow itself does not
recognise as the same (runs, models, their links) is found again by its tag, and a double is removed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megamask.config.schema.tracking import MLflowConfig
from megamask.storage.hashing import sha256_bytes
from megamask.tracking.mlflow.entries import (
    CHECKPOINT_TAG,
    DAMAGED,
    NOTE_TAG,
    PRUNED,
    STATE_TAG,
    CheckpointEntry,
    DatasetEntry,
    Point,
)
from megamask.tracking.mlflow.points import RunStatus
from megamask.tracking.mlflow.registry import Registry, registered_name
from megamask.tracking.mlflow.store import create_database, silence, store_of

_METRICS_PER_BATCH = 1000
_PARAMS_OR_TAGS_PER_BATCH = 100
_TEXT_CHARACTERS = 6000
# The page of an experiment that trains models, not the one for language applications.
_KIND_OF_PAGE = {"mlflow.experimentKind": "custom_model_development"}
_MODEL_TYPE = "megamask-checkpoint"
_READY = "READY"
_CLOSED = {PRUNED: "UNSPECIFIED", DAMAGED: "FAILED"}
# What MLflow's client raises comes from these packages, or is an OSError.
_FOREIGN = frozenset({"mlflow", "requests", "urllib3", "sqlalchemy", "sqlite3"})


class MLflowRun:
    """One run in MLflow; a method sends at once and raises what MLflow, its database or the network raise."""

    def __init__(self, client: Any, run: Any, registry: Registry) -> None:
        self._client = client
        self._registry = registry
        self.params: Mapping[str, str] = dict(run.data.params)
        self.tags: Mapping[str, str] = dict(run.data.tags)
        self._known_params = set(self.params)
        self._models: dict[str, Any] | None = None
        self.run_id = str(run.info.run_id)
        self.experiment_id = str(run.info.experiment_id)

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Add the parameters that are missing; MLflow never changes one."""
        from mlflow.entities import Param

        missing = [Param(key, text_of(value)) for key, value in values.items() if key not in self._known_params]
        for piece in _pieces(missing, _PARAMS_OR_TAGS_PER_BATCH):
            self._client.log_batch(self.run_id, params=piece)
        self._known_params |= values.keys()

    def set_tags(self, values: Mapping[str, Any]) -> None:
        """Set tags, replacing earlier values."""
        from mlflow.entities import RunTag

        tags = [RunTag(key, text_of(value)) for key, value in values.items()]
        for piece in _pieces(tags, _PARAMS_OR_TAGS_PER_BATCH):
            self._client.log_batch(self.run_id, tags=piece)

    def log_points(self, points: Sequence[Point], model_id: str | None = None) -> None:
        """Add points; a repeated point with the same time and value is stored once."""
        from mlflow.entities import Metric

        for piece in _pieces(points, _METRICS_PER_BATCH):
            metrics = [
                Metric(
                    key,
                    value,
                    time_ms,
                    step,
                    model_id=model_id,
                    dataset_name=None if dataset is None else dataset[0],
                    dataset_digest=None if dataset is None else dataset[1],
                )
                for key, value, time_ms, step, dataset in piece
            ]
            self._client.log_batch(self.run_id, metrics=metrics)

    def set_status(self, status: RunStatus, time_ms: int) -> None:
        """Set the run's status; RUNNING has no end time."""
        if status == "RUNNING":
            self._client.update_run(self.run_id, status)
        else:
            self._client.set_terminated(self.run_id, status, end_time=time_ms)

    def log_datasets(self, entries: Sequence[DatasetEntry]) -> None:
        """Add the datasets that the run does not name yet."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                Dataset(
                    name=entry.name,
                    digest=entry.digest,
                    source_type="local",
                    source=json.dumps({"uri": entry.source}),
                    profile=json.dumps(entry.profile),
                ),
                tags=[InputTag(key, value) for key, value in entry.tags.items()],
            )
            for entry in entries
        ]
        if inputs:
            self._client.log_inputs(self.run_id, datasets=inputs)

    def log_checkpoint(self, entry: CheckpointEntry, commit_file: Path) -> None:
        """Enter a commit among the run's models, once, however often it is sent. READY is a complete entry.

        Args:
            commit_file: its COMMIT.json, kept beside the entry if it is still there.
        """
        model = self._known_models().get(entry.checkpoint)
        if model is not None and (str(model.status) == _READY or model.tags.get(STATE_TAG) in _CLOSED):
            self._registry.register(entry.checkpoint, model, entry.tags)
            return
        if model is None:
            model = self._client.create_logged_model(
                self.experiment_id,
                name=entry.name,
                source_run_id=self.run_id,
                tags=entry.tags,
                params=entry.params,
                model_type=_MODEL_TYPE,
            )
            self._known_models()[entry.checkpoint] = model
        if commit_file.is_file():
            self._client.log_model_artifact(model.model_id, str(commit_file))
        self.log_points(entry.points, model.model_id)
        self._link(model.model_id, entry.step)
        self._known_models()[entry.checkpoint] = self._client.finalize_logged_model(model.model_id, _READY)
        self._registry.register(entry.checkpoint, model, entry.tags)

    def set_best(self, checkpoint: str) -> None:
        """Point the registered model's alias `best` at a commit."""
        self._registry.set_best(checkpoint)

    def mark_checkpoint(self, checkpoint: str, tags: Mapping[str, str]) -> None:
        """Set tags of a commit's entry; one that was never entered stays so."""
        model = self._known_models().get(checkpoint)
        if model is None:
            return
        self._client.set_logged_model_tags(model.model_id, {key: text_of(value) for key, value in tags.items()})
        if (status := _CLOSED.get(tags.get(STATE_TAG, ""))) is not None:
            # a checkpoint that is gone or damaged is not "Ready" in the list of models
            self._known_models()[checkpoint] = self._client.finalize_logged_model(model.model_id, status)
            self._registry.mark(checkpoint, {key: text_of(value) for key, value in tags.items()})

    def describe(self, text: str, known: Collection[str]) -> None:
        """Set the description, unless a person has replaced those that this program wrote (`known`, as sha256)."""
        present = self._client.get_run(self.run_id).data.tags.get(NOTE_TAG)
        if present is None or sha256_bytes(present.encode()) in known:
            self.set_tags({NOTE_TAG: text})

    def log_text(self, path: str, text: str) -> None:
        """Store a text as the run's artifact `path`, in place of an earlier one."""
        self._client.log_text(self.run_id, text, path)

    def log_file(self, path: Path, folder: str) -> None:
        """Store a file as an artifact of the run."""
        self._client.log_artifact(self.run_id, str(path), folder)

    def history(self, key: str) -> list[Point]:
        """Return every stored point of a metric."""
        return [
            Point(key, float(point.value), int(point.timestamp), int(point.step))
            for point in self._client.get_metric_history(self.run_id, key)
        ]

    def checkpoints(self) -> dict[str, Mapping[str, str]]:
        """Return the parameters of every entered commit, by the name of its folder; nothing is removed."""
        models = sorted(self._list_models(), key=lambda found: (found.creation_timestamp, found.model_id))
        tagged = ((model, _checkpoint_of(model)) for model in models)
        self._models = {name: model for model, name in reversed([*tagged]) if name is not None}
        return {name: dict(model.params or {}) for name, model in self._models.items()}

    def commit_artifact(self, checkpoint: str) -> bytes | None:
        """Return the bytes of the COMMIT.json of an entered commit, or None if it has none."""
        import tempfile

        from mlflow.artifacts import download_artifacts
        from mlflow.exceptions import MlflowException

        model = self._known_models()[checkpoint]
        with tempfile.TemporaryDirectory() as folder:
            try:
                path = download_artifacts(
                    artifact_uri=f"{model.artifact_location}/COMMIT.json",
                    dst_path=folder,
                    tracking_uri=self._client.tracking_uri,
                )
            except (MlflowException, OSError):
                return None
            return Path(path).read_bytes()

    def num_checkpoints(self) -> int:
        """Return the number of entered commits, looked up anew; remove duplicates."""
        self._models = None
        return len(self._known_models())

    def status(self) -> str:
        """Return the stored status of the run."""
        return str(self._client.get_run(self.run_id).info.status)

    def _link(self, model_id: str, step: int) -> None:
        """Name a model as the run's output, which MLflow refuses to do twice."""
        from mlflow.entities import LoggedModelOutput
        from mlflow.exceptions import MlflowException

        try:
            self._client.log_outputs(self.run_id, [LoggedModelOutput(model_id, step)])
        except MlflowException:
            outputs = self._client.get_run(self.run_id).outputs
            if outputs is None or model_id not in {output.model_id for output in outputs.model_outputs}:
                raise

    def _known_models(self) -> dict[str, Any]:
        """The run's models by the folder name of their commit; of doubles the first one stays."""
        if self._models is None:
            models: dict[str, Any] = {}
            for model in sorted(self._list_models(), key=lambda found: (found.creation_timestamp, found.model_id)):
                checkpoint = _checkpoint_of(model)
                if checkpoint is None:
                    continue
                if checkpoint in models:
                    self._client.delete_logged_model(model.model_id)
                else:
                    models[checkpoint] = model
            self._models = models
        return self._models

    def _list_models(self) -> Iterator[Any]:
        token = None
        while True:
            page = self._client.search_logged_models(
                [self.experiment_id], filter_string=f"source_run_id = '{self.run_id}'", page_token=token
            )
            yield from page
            token = page.token
            if not token:
                return


def open_run(
    run_dir: Path, config: MLflowConfig, *, run_id: str, known: tuple[str, str] | None, start_ms: int | None
) -> tuple[MLflowRun, bool]:
    """Import MLflow, open or create the store, and find a run in it or create it.

    Args:
        run_id: the run's own id, by which it is found.
        known: MLflow's ids of the experiment and the run that were used so far at this uri, if any.
        start_ms: when the run began, for a new entry.

    Returns:
        The run, and whether it is the one that `known` named.

    Raises:
        UsageError: the uri's environment variable is not set.
    """
    silence()
    from mlflow import MlflowClient

    store = store_of(run_dir, config)
    if store.database is not None and not store.database.exists():
        create_database(store.database, lambda uri: _make_schema(uri, store.artifacts))
    client = MlflowClient(tracking_uri=store.uri)
    experiment_id = _experiment(client, config.experiment, store.artifacts)
    runs = _runs_of(client, experiment_id, run_id)
    run = next((found for found in runs if (experiment_id, found.info.run_id) == known), None)
    if run is not None:
        return _with_registry(client, run, run_dir, run_id), True
    if runs:
        return _with_registry(client, runs[0], run_dir, run_id), False
    tags = {"megamask.run_id": run_id}
    run = client.create_run(experiment_id, start_time=start_ms, run_name=run_dir.name, tags=tags)
    return _with_registry(client, run, run_dir, run_id), False


def find_run(run_dir: Path, config: MLflowConfig, *, run_id: str) -> MLflowRun | None:
    """Return a run that MLflow has, found by its tag; creates nothing.

    Raises:
        UsageError: the uri's environment variable is not set.
    """
    silence()
    from mlflow import MlflowClient

    store = store_of(run_dir, config)
    if store.database is not None and not store.database.exists():
        return None
    client = MlflowClient(tracking_uri=store.uri)
    experiment = client.get_experiment_by_name(config.experiment)
    if experiment is None:
        return None
    runs = _find_runs(client, str(experiment.experiment_id), run_id)
    return _with_registry(client, runs[0], run_dir, run_id) if runs else None


def _with_registry(client: Any, run: Any, run_dir: Path, run_id: str) -> MLflowRun:
    name, is_served = registered_name(run_dir.name, run_id), str(client.tracking_uri).startswith("http")
    return MLflowRun(client, run, Registry(client, name, str(run.info.run_id), is_served=is_served))


def is_refusal(error: BaseException) -> bool:
    """Return whether an error came from MLflow, its database or the network, and not from a fault of this program."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _FOREIGN


def text_of(value: Any) -> str:
    """A parameter or tag as text; one that MLflow would refuse for its length is named by its length."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _TEXT_CHARACTERS else f"({len(text)} characters: see the config artifact)"


def _make_schema(uri: str, artifacts: str | None) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    SqlAlchemyStore(uri, artifacts).engine.dispose()


def _experiment(client: Any, name: str, artifacts: str | None) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is not None and experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)  # a deleted one takes no run and keeps its name
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifacts, tags=_KIND_OF_PAGE))
        except MlflowException:
            experiment = client.get_experiment_by_name(name)  # another run created it in between
            if experiment is None:
                raise
    return str(experiment.experiment_id)


def _runs_of(client: Any, experiment_id: str, run_id: str) -> list[Any]:
    """The living runs with this id, the fullest first. A server that answered too late may have made an empty double,
    which is removed.
    """
    runs = _find_runs(client, experiment_id, run_id)
    kept = runs[:1]
    for run in runs[1:]:
        if run.data.params or run.data.metrics:
            kept.append(run)
        else:
            client.delete_run(run.info.run_id)
    return kept


def _find_runs(client: Any, experiment_id: str, run_id: str) -> list[Any]:
    found = client.search_runs([experiment_id], filter_string=f"tags.`megamask.run_id` = '{run_id}'")
    return sorted(found, key=lambda run: (-len(run.data.params) - len(run.data.metrics), run.info.run_id))


def _checkpoint_of(model: Any) -> str | None:
    tags = model.tags or {}
    return tags.get(CHECKPOINT_TAG) or tags.get(f"megamask.{CHECKPOINT_TAG}")  # the longer name is that of 0.1.0


def _pieces(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[begin : begin + size] for begin in range(0, len(items), size))
