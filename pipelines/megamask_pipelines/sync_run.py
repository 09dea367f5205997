"""Sending a run's journal to MLflow after the fact, from the run directory alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megamask.config.schema.tracking import MLflowConfig
from megamask.config.secrets import check_no_secret, check_reference
from megamask.errors import UsageError
from megamask.provenance.redaction import register_references
from megamask.runs.claims import claimed_attempts, has_died
from megamask.runs.configs import newest_config
from megamask.runs.record import read_run
from megamask.runs.status import read_status
from megamask.tracking.mlflow.points import RunStatus, status_after_exit
from megamask.tracking.mlflow.store import URI_KEY, check_target, page_of, shown_uri, store_of
from megamask.tracking.mlflow.sync import compare, complete

_NOTHING_SENT = "Nothing was sent."


def sync_run(run_dir: Path, *, uri: str | None = None) -> dict[str, Any]:
    """Make MLflow's history of a run complete.

    Args:
        uri: the server to send to; None is that of the newest attempt's config.

    Returns:
        run_id, run_dir, uri, experiment, mlflow_run_id, page, records_sent, steps, doubled_steps, checkpoints, status.

    Raises:
        UsageError: not a run directory, tracking never had a target, or a uri that cannot be one.
        StorageError: the server does not take it.
    """
    record = read_run(run_dir)
    folder = run_dir.resolve()
    config = _target(folder, uri)
    done = complete(folder, config, keeps_foreign_state=uri is not None, ended=lambda: _unseen_end(folder))
    shown = shown_uri(store_of(folder, config).uri)
    page = page_of(shown, done.experiment_id, done.mlflow_run_id)
    return {
        "run_id": record.run_id,
        "run_dir": str(run_dir),
        "uri": shown,
        "experiment": config.experiment,
        "mlflow_run_id": done.mlflow_run_id,
        "page": page,
        "records_sent": done.num_records_sent,
        "steps": done.num_steps,
        "doubled_steps": done.num_doubled_steps,
        "checkpoints": done.num_checkpoints,
        "status": done.status,
    }


def compare_with_mlflow(run_dir: Path, *, uri: str | None = None) -> list[str]:
    """Return every difference between a run's records and MLflow; raises as `sync_run`, and writes nothing."""
    folder = run_dir.resolve()
    return compare(folder, _target(folder, uri))


def mlflow_of(run_dir: Path) -> MLflowConfig:
    """Return the MLflow of a run's newest attempt; raises as `sync_run`."""
    return _target(run_dir, None)


def _target(run_dir: Path, uri: str | None) -> MLflowConfig:
    stored = newest_config(run_dir)
    config = None if stored is None else stored.tracking.mlflow
    if config is not None:
        register_references(config)
    if uri is not None:
        check_no_secret("--uri", uri, "given on the command line")
        check_reference("--uri", uri, "given on the command line")
        register_references(MLflowConfig(uri=uri))
        given = replace(config or MLflowConfig(), uri=uri)
        check_target("--uri", run_dir, given, after=_NOTHING_SENT)
        return given
    if config is None or (config.uri is None and not config.enabled):
        why = "no attempt left a config" if config is None else "its newest attempt had tracking.mlflow.enabled=false"
        raise UsageError(
            f"{run_dir} has no MLflow to send to: {why} and no {URI_KEY}. {_NOTHING_SENT}",
            hint="name one: `megamask sync RUN --uri http://HOST:PORT`, or --uri sqlite:////FOLDER/mlflow.db",
        )
    check_target(URI_KEY, run_dir, config, after=_NOTHING_SENT)
    return config


def _unseen_end(run_dir: Path) -> RunStatus | None:
    """The status of a newest attempt whose end the journal does not hold, or None while it may be alive."""
    attempts = claimed_attempts(run_dir)
    if not attempts:
        return None
    status = read_status(run_dir)
    if status is not None and status.attempt == attempts[-1] and status.exit_code is not None:
        return status_after_exit(status.exit_code, is_done=status.phase == "done")
    return "FAILED" if has_died(run_dir, attempts[-1]) else None
