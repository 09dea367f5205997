"""Runs written by hand, the sink that sends them, and what the store then holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megamask.config.schema.tracking import MLflowConfig
from megamask.tracking.journal.writer import Journal
from megamask.tracking.mlflow.sink import MLflowSink

DRAIN_S = 240.0


def make_run(output_dir: Path, name: str, **changes: Any) -> Path:
    run_dir = output_dir / name
    (run_dir / "config").mkdir(parents=True)
    record = {
        "format": "megamask-run",
        "version": 1,
        "laws": {},
        "run_id": f"id-of-{name}",
        "identity": {"model.num_layers": 2, "run.seed": 7, "objective.noise_schedule": "linear"},
        "extendable": {"training.steps": 4},
        "corpora": {"main": "c0ffee"},
        "tokenizer_digest": "70cken",
        "code_version": "v1",
        **changes,
    }
    (run_dir / "run.json").write_text(json.dumps(record))
    return run_dir


def write_attempt(run_dir: Path, attempt: int, steps: range, exit_code: int | None, *, is_done: bool = False) -> None:
    (run_dir / "config" / f"attempt-{attempt:04d}.yaml").write_text(f"attempt: {attempt}\n")
    with Journal.open(run_dir, attempt) as journal:
        journal.append("attempt_started", attempt=attempt)
        for step in steps:
            journal.append("step", step=step, loss=4.0 / step, grad_norm=float("nan"), seconds={"data": 0.25})
        last = steps[-1]
        journal.append("evaluation", step=last, nelbo_nats_per_token=5.0, standard_error=0.1, split="validation")
        journal.append("checkpoint_committed", step=last, digest=f"d{last}")
        if exit_code is not None:
            journal.append("attempt_ended", attempt=attempt, exit_code=exit_code, step=last)
        if is_done:
            journal.append("run_completed", step=last)


def send(run_dir: Path, **options: Any) -> bool:
    sink = MLflowSink(run_dir, MLflowConfig(**options.pop("config", {})), **options)
    sink.start()
    return sink.drain(DRAIN_S)


def client(output_dir: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{output_dir / 'mlflow.db'}")


def stored_run(output_dir: Path, name: str) -> Any:
    """The one MLflow run with this run's tag."""
    store = client(output_dir)
    experiments = [experiment.experiment_id for experiment in store.search_experiments()]
    (run,) = store.search_runs(experiments, filter_string=f"tags.`megamask.run_id` = 'id-of-{name}'")
    return run


def history(output_dir: Path, name: str, key: str) -> list[tuple[int, float]]:
    run = stored_run(output_dir, name)
    points = client(output_dir).get_metric_history(run.info.run_id, key)
    return sorted((point.step, point.value) for point in points)
