from __future__ import annotations

import pytest

from megamask.tracking.mlflow_store import shown_uri


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://u:p@h:5000/x?token=t#f", "https://h:5000/x"),
        ("http://h:5000", "http://h:5000"),
        ("sqlite:////data/runs/mlflow.db?timeout=3", "sqlite:////data/runs/mlflow.db"),
        ("databricks", "databricks"),
    ],
)
def test_shown_uri_holds_no_credential(uri: str, shown: str) -> None:
    assert shown_uri(uri) == shown
