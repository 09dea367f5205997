"""`--track` of evaluate and sample: the result of a checkpoint on its run's page in MLflow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megamask.errors import MegamaskError, UsageError
from megamask.evaluation.request import EvaluationRequest
from megamask.runs.layout import record_path
from megamask.tracking.journal.seek import newest_start
from megamask.tracking.mlflow.entries import dataset_key
from megamask.tracking.mlflow.results import Result, RunPage
from megamask_pipelines.sample import SampleRequest
from megamask_pipelines.sync_run import mlflow_of

_ANY_ATTEMPT = 1 << 62


def tracked(path: Path, measure: Callable[[], dict[str, Any]], result_of: Callable[..., Result]) -> dict[str, Any]:
    """Measure, and put the result on the page of the run that a path belongs to.

    Args:
        path: a run directory, or a checkpoint folder inside one.
        result_of: the result of (run directory, answer).

    Returns: the answer of `measure`, and mlflow_page.
    Raises:
        UsageError: the path is not of a run, or MLflow does not have it; nothing was measured.
        StorageError: MLflow does not answer; if it took nothing after the measurement, `details` has the answer.
    """
    run_dir = run_of(path)
    page = RunPage(run_dir, mlflow_of(run_dir))
    answer = measure()
    try:
        page.add(result_of(run_dir, answer))
    except MegamaskError as error:
        error.details = dict(answer)
        raise
    return {**answer, "mlflow_page": page.address}


def evaluation_result(run_dir: Path, request: EvaluationRequest, answer: Mapping[str, Any]) -> Result:
    """Return the result of an evaluation; its metrics are in a section of their own for each kind of text."""
    what = "token_ids" if request.token_ids else "text" if request.texts else request.split
    values = {
        "bound_nats_per_token": answer["nelbo_nats_per_token"],
        "standard_error_nats_per_token": answer["standard_error"],
        "bits_per_byte": answer["bits_per_byte"],
    }
    return Result(
        kind="evaluations",
        step=answer["step"],
        content={"request": _plain(asdict(request)), "result": _plain(answer)},
        metrics={f"evaluate/{what}/{key}": float(value) for key, value in values.items() if value is not None},
        dataset=None if what in ("text", "token_ids") or request.corpus else _dataset(run_dir, what),
    )


def sample_result(run_dir: Path, request: SampleRequest, answer: Mapping[str, Any]) -> Result:
    """Return the result of sampling: a text, no numbers."""
    content = {"request": _plain(asdict(request)), "result": _plain(answer)}
    return Result(kind="samples", step=answer["step"], content=content, metrics={})


def run_of(path: Path) -> Path:
    """Return the run directory that a run directory or a checkpoint folder in it means.

    Raises:
        UsageError: neither.
    """
    folder = path.absolute()
    for candidate in (folder, *folder.parents[1:2]):
        if record_path(candidate).is_file():
            return candidate
    raise UsageError(
        f"--track: {path} is neither a run directory nor a checkpoint inside one, so it has no page in MLflow. "
        "Nothing was measured.",
        hint="give RUN or RUN/checkpoints/step-..., or leave --track out",
    )


def _dataset(run_dir: Path, split: str) -> tuple[str, str] | None:
    started = newest_start(run_dir, before=_ANY_ATTEMPT)
    datasets = (started.datasets if started is not None else None) or []
    return next((dataset_key(each) for each in datasets if each.get("split") == split), None)


def _plain(value: Any) -> Any:
    """The value with paths as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
