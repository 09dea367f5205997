"""Results measured after training, on the run's page in MLflow: numbers and an artifact that no journal has.

A result is sent at once, by the person who asked for it. The same result sent again changes nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamask.config.schema.tracking import MLflowConfig
from megamask.errors import MegamaskError, StorageError, UsageError
from megamask.runs.record import read_run
from megamask.storage.hashing import sha256_bytes
from megamask.tracking.mlflow.client import MLflowRun, find_run, is_refusal
from megamask.tracking.mlflow.entries import Point
from megamask.tracking.mlflow.sink import outage_text
from megamask.tracking.mlflow.store import prepare_environment, shown_page, shown_uri, store_of

_REQUEST_TIMEOUT_S = 30
_REQUEST_RETRIES = 2


@dataclass(frozen=True, kw_only=True)
class Result:
    """A result and where it belongs.

    Args:
        kind: folder of the artifact: "evaluations" or "samples".
        step: of the checkpoint.
        content: JSON object of everything that was asked and found.
        metrics: numbers by key.
        dataset: name and digest that MLflow knows the measured split by, if it was one of the run's.
    """

    kind: str
    step: int
    content: Mapping[str, Any]
    metrics: Mapping[str, float]
    dataset: tuple[str, str] | None = None

    @property
    def artifact(self) -> tuple[str, str]:
        """(path, text) of the artifact; equal results have equal paths."""
        text = json.dumps(self.content, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
        return f"{self.kind}/step-{self.step:08d}-{sha256_bytes(text.encode())[:8]}.json", text


class RunPage:
    """A run in MLflow that takes results; made before anything is measured.

    Raises:
        UsageError: MLflow does not have the run.
        StorageError: it does not answer.
    """

    def __init__(self, run_dir: Path, config: MLflowConfig) -> None:
        self._run_dir, self._config = run_dir, config
        prepare_environment(timeout_s=_REQUEST_TIMEOUT_S, retries=_REQUEST_RETRIES)
        self._run = self._find()

    @property
    def address(self) -> str:
        """Address where a person looks at the run."""
        return shown_page(self._uri, self._run.experiment_id, self._run.run_id)

    def add(self, result: Result) -> None:
        """Store a result: its numbers at the checkpoint's step, and all of it as an artifact.

        Raises:
            StorageError: MLflow does not take it.
        """
        now = int(time.time() * 1000)
        try:
            known = {key: {(point.step, point.value) for point in self._run.history(key)} for key in result.metrics}
            self._run.log_points(
                [
                    Point(key, value, now, result.step, result.dataset)
                    for key, value in result.metrics.items()
                    if (result.step, value) not in known[key]
                ]
            )
            self._run.log_text(*result.artifact)
        except Exception as error:
            raise self._refused(error, "did not take the result") from error

    def _find(self) -> MLflowRun:
        run_id = read_run(self._run_dir).run_id
        try:
            run = find_run(self._run_dir, self._config, run_id=run_id)
        except Exception as error:
            raise self._refused(error, "does not answer. Nothing was measured") from error
        if run is None:
            raise UsageError(
                f"--track: MLflow at {self._uri} has no run with the tag megamask.run_id = {run_id}. "
                "Nothing was measured.",
                hint=f"send the run first: `megamask sync {self._run_dir}`",
            )
        return run

    @property
    def _uri(self) -> str:
        return shown_uri(store_of(self._run_dir, self._config).uri)

    def _refused(self, error: Exception, what: str) -> Exception:
        if isinstance(error, MegamaskError) or not is_refusal(error):
            return error
        text = outage_text(error, self._run_dir, self._config)
        return StorageError(
            f"MLflow at {self._uri} {what} ({type(error).__name__}: {text}).",
            hint="start the server, then run the same command again",
        )
