"""Schema of an MLflow database, compared with the installed MLflow without importing it.

MLflow refuses a database that another version made. During training that would look like an outage that never ends.
A SQLite file is read directly; any other database through SQLAlchemy, which MLflow itself uses.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from megamask.errors import UsageError

_REVISION = re.compile(r"^revision(?:: \w+)? = ['\"](\w+)['\"]", re.MULTILINE)
_BEFORE = re.compile(r"^down_revision(?:: [^=]+)? = ['\"](\w+)['\"]", re.MULTILINE)
_QUERY = "SELECT version_num FROM alembic_version"
_SQL_URI = re.compile(r"(?:postgresql|mysql|sqlite|mssql)(?:\+\w+)?://")  # the kinds that MLflow takes
_ANSWER_TIMEOUT_S = 10.0  # a server that does not answer is an outage, which training does not wait for


def check_schema(database: Path, *, after: str) -> None:
    """Refuse a SQLite file whose schema is not that of the installed MLflow; one that is not there yet passes.

    Args:
        after: what has not happened.

    Raises:
        UsageError: names the command that migrates it.
    """
    compare_revision(stored_revision(database), str(database), f"sqlite:///{database}", after=after)


def check_server_schema(uri: str, shown: str, *, after: str) -> None:
    """Refuse a database of another kind than `check_schema`'s; one that is empty or does not answer passes.

    Args:
        uri: as SQLAlchemy takes it; anything else passes.
        shown: the same without a credential.
        after: what has not happened.

    Raises:
        UsageError: names the command that migrates it, or the driver that is not installed.
    """
    if _SQL_URI.match(uri):
        compare_revision(revision_at(uri, shown, after=after), shown, shown, after=after)


def compare_revision(stored: str | None, name: str, shown_uri: str, *, after: str) -> None:
    """Refuse a revision that is not the newest of the installed MLflow; raises as `check_schema`."""
    known = known_revisions()
    if stored is None or not known or stored == known[-1]:
        return
    if stored in known:
        raise UsageError(
            f"{name} was made by an older MLflow: its schema is {stored}, the installed MLflow has {known[-1]}. "
            f"{after}",
            hint=f"copy the database, then run `mlflow db upgrade {shown_uri}`",
        )
    raise UsageError(
        f"{name} was made by a newer MLflow: the installed one does not know its schema {stored}. {after}",
        hint="install the MLflow that made it, or name another store with tracking.mlflow.uri",
    )


def stored_revision(database: Path) -> str | None:
    """Return the schema revision of a database; None where there is no such file, or it is not a database of MLflow."""
    if not database.is_file():
        return None
    with contextlib.suppress(sqlite3.Error):  # MLflow itself reports a file that is damaged or locked
        with contextlib.closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            row = connection.execute(_QUERY).fetchone()
        return None if row is None else str(row[0])
    return None


def revision_at(uri: str, shown: str, *, after: str) -> str | None:
    """Return the schema revision of any database that SQLAlchemy opens; None where it is empty or does not answer.

    Raises:
        UsageError: the driver of such a database cannot be imported.
    """
    from sqlalchemy import create_engine, text
    from sqlalchemy.exc import SQLAlchemyError
    from sqlalchemy.pool import NullPool

    try:
        engine = create_engine(uri, poolclass=NullPool)
    except ImportError as error:
        name = error.name or uri.partition(":")[0]  # a driver that misses a C library names no module
        raise UsageError(
            f"the driver {name} of the database {shown} cannot be imported ({error}). {after}",
            hint=f"install the package with the module {name}, or name another store with tracking.mlflow.uri",
        ) from error
    except SQLAlchemyError:  # MLflow reports a URI that it cannot read
        return None

    def ask() -> str | None:
        with contextlib.suppress(SQLAlchemyError, OSError), engine.connect() as connection:
            found = connection.execute(text(_QUERY)).scalar()
            return None if found is None else str(found)
        return None

    return within(_ANSWER_TIMEOUT_S, ask)


def within(seconds: float, ask: Callable[[], str | None]) -> str | None:
    """Return an answer, or None if it takes longer; a driver's own timeouts are of minutes."""
    answers: list[str | None] = []
    thread = threading.Thread(target=lambda: answers.append(ask()), name="megamask-schema", daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def known_revisions() -> list[str]:
    """Return the revisions that the installed MLflow knows, oldest first; empty where they cannot be read."""
    found = find_spec("mlflow")
    if found is None or found.origin is None:
        return []
    later: dict[str, str] = {}
    revisions: set[str] = set()
    for path in (Path(found.origin).parent / "store" / "db_migrations" / "versions").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        revision, before = _REVISION.search(text), _BEFORE.search(text)
        if revision is not None:
            revisions.add(revision[1])
            if before is not None:
                later[before[1]] = revision[1]
    [*first] = revisions - set(later.values())
    if len(first) != 1:
        return []
    chain = [first[0]]
    while chain[-1] in later:
        chain.append(later[chain[-1]])
    return chain
