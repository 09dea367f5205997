"""MLflow store of a run: its address, the creation of a local one, and the part of the address that may be shown."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shlex
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from megamask.config.schema.tracking import MLflowConfig
from megamask.config.secrets import resolve_secret, shown
from megamask.errors import UsageError
from megamask.tracking.mlflow.schema import check_schema, check_server_schema

URI_KEY = "tracking.mlflow.uri"
_SQLITE = "sqlite:///"
# MLflow prints the address of what it has stored, credential included.
_NO_ADDRESS_ON_STDOUT = {
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_PRINT_MODEL_URLS_ON_CREATION": "false",
}
_SHORTEST_SECRET = 4  # a shorter piece of a URI would hide ordinary text


@dataclass(frozen=True, kw_only=True)
class Store:
    """A tracking store.

    Args:
        uri: as MLflow takes it; may hold a credential.
        artifacts: where artifacts go, or None where the server decides.
        database: the local file to make if it is not there.
    """

    uri: str
    artifacts: str | None = None
    database: Path | None = None


def store_of(run_dir: Path, config: MLflowConfig) -> Store:
    """The store of a run: tracking.mlflow.uri, or a SQLite file beside the run directories.

    Raises:
        UsageError: the uri is env:NAME and that variable is not set.
    """
    if config.uri is None:
        folder = run_dir.absolute().parent
        database = folder / "mlflow.db"
        artifacts = (folder / "mlartifacts").as_uri()
        return Store(uri=f"{_SQLITE}{database}", artifacts=artifacts, database=database)
    uri = resolve_secret(URI_KEY, config.uri)
    if not uri.startswith(_SQLITE):
        return Store(uri=uri)
    database = Path(uri.removeprefix(_SQLITE).partition("?")[0]).absolute()
    return Store(uri=uri, artifacts=(database.parent / "mlartifacts").as_uri(), database=database)


def check_target(key: str, run_dir: Path, config: MLflowConfig, *, after: str) -> None:
    """Refuse a store that can never take a run, before anything starts: no address, or a database of another MLflow.

    Args:
        key: that names the store.
        after: what has not happened.

    Raises:
        UsageError: names what to do.
    """
    if config.uri is not None:
        check_uri(key, resolve_secret(key, config.uri), after=after)
    store = store_of(run_dir, config)
    if store.database is not None:
        check_schema(store.database, after=after)
    else:
        check_server_schema(store.uri, shown_uri(store.uri), after=after)


def check_uri(key: str, uri: str, *, after: str) -> None:
    """Refuse what can never be a tracking store, so that it does not look like an outage.

    Args:
        uri: as MLflow would get it.
        after: what has not happened.

    Raises:
        UsageError: names the key and what is allowed.
    """
    if uri.startswith("databricks") or ("://" in uri and not uri.startswith("file:")):
        return
    raise UsageError(
        f"{key} is not a tracking store that MLflow has: {shown(uri)}; allowed: http://HOST:PORT, https://HOST, "
        f"sqlite:///FILE, another database URI, env:NAME. {after}",
        hint=f"start `mlflow server` and give {key} its address, or sqlite:////FOLDER/mlflow.db",
    )


def create_database(database: Path, make: Callable[[str], None]) -> None:
    """Make the schema in a file of its own and rename it: runs that start at once cannot meet a half-made one.

    Args:
        make: writes the schema to a SQLite uri.
    """
    _sweep_unfinished(database)
    temporary = database.with_name(f".{database.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        make(f"{_SQLITE}{temporary}")
        with contextlib.suppress(FileExistsError):  # another run was first: its file holds
            os.link(temporary, database)
    finally:
        temporary.unlink(missing_ok=True)


def _sweep_unfinished(database: Path) -> None:
    """Remove what a process that died while making the schema left behind."""
    for path in database.parent.glob(f".{database.name}.*.tmp*"):
        pid = path.name.removeprefix(f".{database.name}.").partition(".")[0]
        if not (pid.isdecimal() and Path("/proc", pid).exists()):
            path.unlink(missing_ok=True)


def prepare_environment(*, timeout_s: int, retries: int) -> None:
    """Set the timeouts of MLflow's client before it is imported; keep those that the user has set."""
    for name, value in environment(timeout_s=timeout_s, retries=retries).items():
        os.environ.setdefault(name, value)
    os.environ.update(_NO_ADDRESS_ON_STDOUT)


def environment(*, timeout_s: int, retries: int) -> dict[str, str]:
    """The variables of MLflow's client that this program cares about."""
    return {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_s),
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_TRUNCATE_LONG_VALUES": "false",  # a value cut in silence is a wrong value
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_LOGGING_LEVEL": "ERROR",
        **_NO_ADDRESS_ON_STDOUT,
    }


def silence() -> None:
    """Keep the warnings of MLflow and its database off the terminal; its errors arrive as exceptions."""
    for name in ("alembic", "mlflow", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(mlflow|alembic|sqlalchemy)(\.|$)")


def shown_uri(uri: str) -> str:
    """A tracking uri without user, password, query and fragment."""
    parts = urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host, query="", fragment="").geturl() if parts.netloc else uri.partition("?")[0]


def page_of(uri: str, experiment_id: str, run_id: str) -> str | None:
    """Return the address of a run's page, None for a store without pages of its own.

    Without the workflow type MLflow opens its pages for language applications, where the run is not found.
    """
    if not uri.startswith("http"):
        return None
    return f"{shown_uri(uri).rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def shown_page(uri: str, experiment_id: str, run_id: str) -> str:
    """Return where a person looks at a run: its page, or that of a server which is yet to be started on the store."""
    if (page := page_of(uri, experiment_id, run_id)) is not None:
        return page
    local = page_of("http://127.0.0.1:5000", experiment_id, run_id)
    return f"{local} after `mlflow ui --backend-store-uri {shlex.quote(uri)}`"


def without_credentials(text: str, uri: str) -> str:
    """A text of others that may quote a uri or its parts, with those that may hold a credential hidden."""
    text = text.replace(uri, shown_uri(uri))
    for piece in sorted(_secret_pieces(uri), key=len, reverse=True):
        text = text.replace(piece, "***")
    return text


def _secret_pieces(uri: str) -> Iterator[str]:
    parts = urlsplit(uri)
    user = parts.netloc.rpartition("@")[0]
    yield from (piece for piece in (user, parts.query, parts.fragment) if piece)
    values = [user.partition(":")[2] or user, *(value for _, value in parse_qsl(parts.query))]
    for value in values:
        yield from {piece for piece in (value, unquote(value)) if len(piece) >= _SHORTEST_SECRET}
