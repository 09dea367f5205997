from __future__ import annotations

from pathlib import Path

import pytest

from megamask.config.schema.tracking import MLflowConfig
from megamask.errors import UsageError
from megamask.tracking.mlflow.store import (
    check_uri,
    page_of,
    shown_page,
    shown_uri,
    store_of,
    without_credentials,
)


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


@pytest.mark.promise("the credential of a tracking uri is written nowhere")
@pytest.mark.parametrize(
    ("uri", "text", "shown"),
    [
        (
            "https://u:hush@h:5000/x?token=tokn#frag",
            "no https://u:hush@h:5000/x?token=tokn#frag",
            "no https://h:5000/x",
        ),
        ("https://u:hush@h/x?token=tokn", "host h, url /x?token=tokn, u:hush", "host h, url /x?***, ***"),
        ("https://u:h%40sh@h/x", "h@sh of u was refused, h%40sh too", "*** of u was refused, *** too"),
        ("https://hush@h/x", "hush is not known", "*** is not known"),
    ],
)
def test_text_of_others_is_shown_without_the_uris_credential(uri: str, text: str, shown: str) -> None:
    assert without_credentials(text, uri) == shown


def test_default_store_is_a_file_beside_the_run_directories(tmp_path: Path) -> None:
    store = store_of(tmp_path / "runs" / "one", MLflowConfig())
    assert store.uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert store.artifacts == f"file://{tmp_path}/runs/mlartifacts"
    assert store_of(tmp_path, MLflowConfig(uri="http://h:5000")).artifacts is None


@pytest.mark.promise("printed addresses open the run's page among the runs that train models")
def test_page_of_a_run_opens_the_pages_of_training_and_shows_no_credential() -> None:
    address = "https://h/mlflow/#/experiments/3/runs/ab?workflowType=machine_learning"
    assert page_of("https://u:p@h/mlflow/?token=t", "3", "ab") == address
    assert page_of("sqlite:///x.db", "3", "ab") is None
    started = "http://127.0.0.1:5000/#/experiments/3/runs/ab?workflowType=machine_learning"
    assert shown_page("sqlite:///a b.db", "3", "ab") == (
        f"{started} after `mlflow ui --backend-store-uri 'sqlite:///a b.db'`"
    )


@pytest.mark.parametrize("uri", ["http://h:5000", "https://h", "sqlite:///x.db", "postgresql://h/db", "databricks"])
def test_uri_of_a_store_is_taken(uri: str) -> None:
    check_uri("tracking.mlflow.uri", uri, after="Nothing was started.")


@pytest.mark.parametrize("uri", ["runs/mlflow.db", "localhost:5000", "file:///runs", ""])
def test_uri_of_no_store_is_refused(uri: str) -> None:
    with pytest.raises(UsageError, match=r"tracking\.mlflow\.uri is not a tracking store .* Nothing was started"):
        check_uri("tracking.mlflow.uri", uri, after="Nothing was started.")
