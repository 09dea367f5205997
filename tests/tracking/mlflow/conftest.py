from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megamask.tracking.mlflow import sink as mlflow_sink
from megamask.tracking.mlflow.store import environment


@pytest.fixture(scope="session")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of runs, hence one SQLite store, for all files: creating the schema takes seconds."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def quick_sink(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Environment changes of the sink stay in the test, it looks for news often, and MLflow's own folders stay out."""
    monkeypatch.chdir(tmp_path)
    for name, value in environment(timeout_s=5, retries=1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(mlflow_sink, "_SEND_EVERY_S", 0.05)
    monkeypatch.setattr(mlflow_sink, "_DRAIN_PAUSE_S", 0.05)
    yield
