"""Schema of a local MLflow database, compared with the installed MLflow without importing it.

MLflow refuses a database that another version made. During training that would look like an outage that never ends.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
from importlib.util import find_spec
from pathlib import Path

from megamask.errors import UsageError

_REVISION = re.compile(r"^revision(?:: \w+)? = ['\"](\w+)['\"]", re.MULTILINE)
_BEFORE = re.compile(r"^down_revision(?:: [^=]+)? = ['\"](\w+)['\"]", re.MULTILINE)


def check_schema(database: Path, *, after: str) -> None:
    """Refuse a database whose schema is not that of the installed MLflow; one that is not there yet passes.

    Args:
        after: what has not happened.

    Raises:
        UsageError: names the command that migrates it.
    """
    stored, known = stored_revision(database), known_revisions()
    if stored is None or not known or stored == known[-1]:
        return
    if stored in known:
        raise UsageError(
            f"{database} was made by an older MLflow: its schema is {stored}, the installed MLflow has {known[-1]}. "
            f"{after}",
            hint=f"copy the file, then run `mlflow db upgrade sqlite:///{database}`",
        )
    raise UsageError(
        f"{database} was made by a newer MLflow: the installed one does not know its schema {stored}. {after}",
        hint="install the MLflow that made it, or name another store with tracking.mlflow.uri",
    )


def stored_revision(database: Path) -> str | None:
    """Return the schema revision of a database; None where there is no such file, or it is not a database of MLflow."""
    if not database.is_file():
        return None
    with contextlib.suppress(sqlite3.Error):  # MLflow itself reports a file that is damaged or locked
        with contextlib.closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        return None if row is None else str(row[0])
    return None


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
