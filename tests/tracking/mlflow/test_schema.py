"""A database of another MLflow: found before training, without importing MLflow."""

from __future__ import annotations

import sqlite3
import sys
import threading
from pathlib import Path

import pytest

from megamask.errors import UsageError
from megamask.tracking.mlflow import schema
from megamask.tracking.mlflow.schema import check_schema, check_server_schema, known_revisions, stored_revision
from megamask.tracking.mlflow.sync import hint_of
from megamask_pipelines.cli.main import main
from support.command import tiny

PROMISE = pytest.mark.promise(
    "an MLflow database with the schema of another version is refused before training, with the fix"
)


def database(path: Path, revision: str) -> Path:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE alembic_version (version_num VARCHAR(32))")
        connection.execute("INSERT INTO alembic_version VALUES (?)", (revision,))
    return path


@PROMISE
def test_newest_known_revision_is_the_one_that_mlflow_wants() -> None:
    from mlflow.store.db.utils import _get_latest_schema_revision

    assert known_revisions()[-1] == _get_latest_schema_revision()


@PROMISE
def test_schema_of_this_mlflow_passes_and_so_does_a_file_that_is_not_there(tmp_path: Path) -> None:
    check_schema(database(tmp_path / "mlflow.db", known_revisions()[-1]), after="Nothing was started.")
    check_schema(tmp_path / "none.db", after="Nothing was started.")
    assert not (tmp_path / "none.db").exists()


def test_file_that_is_no_database_is_left_to_mlflow(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("no database")
    assert stored_revision(tmp_path / "mlflow.db") is None


@PROMISE
def test_older_and_newer_schemas_are_refused_with_what_to_do(tmp_path: Path) -> None:
    old, new = database(tmp_path / "old.db", known_revisions()[-2]), database(tmp_path / "new.db", "f" * 12)
    with pytest.raises(UsageError, match="made by an older MLflow") as found:
        check_schema(old, after="Nothing was started.")
    assert f"mlflow db upgrade sqlite:///{old}" in str(found.value.hint)
    with pytest.raises(UsageError, match="made by a newer MLflow") as found:
        check_schema(new, after="Nothing was started.")
    assert "install the MLflow that made it" in str(found.value.hint)


@PROMISE
@pytest.mark.parametrize(("revision", "fix"), [(-2, "mlflow db upgrade DATABASE"), ("f" * 12, "install the MLflow")])
def test_database_of_any_kind_is_asked_for_its_schema(tmp_path: Path, revision: int | str, fix: str) -> None:
    """A URI with a driver's name goes through SQLAlchemy, as those of PostgreSQL and MySQL do."""
    found = known_revisions()[revision] if isinstance(revision, int) else revision
    uri = f"sqlite+pysqlite:///{database(tmp_path / 'other.db', found)}"
    with pytest.raises(UsageError, match=r"^DATABASE was made by .* Nothing was started\.") as refused:
        check_server_schema(uri, "DATABASE", after="Nothing was started.")
    assert fix in str(refused.value.hint)


@PROMISE
def test_database_that_is_current_empty_or_does_not_answer_passes(tmp_path: Path) -> None:
    current = database(tmp_path / "current.db", known_revisions()[-1])
    for uri in (f"sqlite+pysqlite:///{current}", f"sqlite+pysqlite:///{tmp_path}/empty.db", "http://h:5000"):
        check_server_schema(uri, "DATABASE", after="Nothing was started.")
    unanswered = threading.Event()
    assert schema.within(0.01, lambda: str(unanswered.wait(60))) is None
    unanswered.set()


@PROMISE
def test_database_whose_driver_is_missing_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(UsageError, match=r"driver psycopg2 of the database postgresql://h/db .* Nothing was") as found:
        check_server_schema("postgresql+psycopg2://u:hush@h/db", "postgresql://h/db", after="Nothing was started.")
    assert "hush" not in f"{found.value} {found.value.hint}"


@PROMISE
def test_refusal_of_a_database_elsewhere_names_the_migration() -> None:
    """MLflow's own words, so that a change of them is seen."""
    import inspect

    from mlflow.store.db.utils import _verify_schema

    words = "out-of-date database schema"
    assert words in inspect.getsource(_verify_schema)
    assert "mlflow db upgrade" in hint_of(RuntimeError(f"Detected {words} (found version a, but expected b)"))
    assert "start the server" in hint_of(RuntimeError("connection refused"))


@PROMISE
def test_training_refuses_an_old_database_before_it_claims_the_run(
    small_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = database(tmp_path / "mlflow.db", known_revisions()[0]).read_bytes()
    assert main(["train", *tiny(small_corpus, tmp_path, "old", "tracking.mlflow.enabled=true")]) == 2
    assert "mlflow db upgrade" in capsys.readouterr().err
    assert not (tmp_path / "old").exists()
    assert (tmp_path / "mlflow.db").read_bytes() == before
