"""Ranges of objects in a store: s3://, gs://, az:// and http(s):// folders, read with bounded retries.

Credentials come from the environment alone, as each store's own tools read them (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL,
GOOGLE_SERVICE_ACCOUNT, AZURE_STORAGE_ACCOUNT_NAME and so on). Nothing is written.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from megamask.errors import StorageError, UsageError

SCHEMES = ("s3", "gs", "az", "http", "https")
_ATTEMPTS = 4
_FIRST_PAUSE_S = 0.2
_REQUEST_TIMEOUT = "30s"
_CONNECT_TIMEOUT = "5s"
_RETRY_TIMEOUT_S = 60


def is_remote(root: str) -> bool:
    """Return whether a root names an object store instead of a folder."""
    scheme, sign, _ = root.partition("://")
    return bool(sign) and scheme in SCHEMES


class RemoteFolder:
    """The objects below a URL.

    Args:
        url: SCHEME://BUCKET/PREFIX, or an http(s) folder whose server answers range requests.

    Raises:
        UsageError: the scheme is not supported, the URL carries credentials, or obstore is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        host = self.url.partition("://")[2].partition("/")[0]
        if not is_remote(url) or "@" in host:
            raise UsageError(
                f"the root {'with credentials in it' if '@' in host else url} is not supported; allowed: a folder, or "
                f"{', '.join(f'{scheme}://' for scheme in SCHEMES)} without credentials. Nothing was read.",
                hint="credentials come from the environment",
            )
        self._store = _open_store(self.url)

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """The bytes of an object, or `size` of them from an offset.

        Raises:
            FileNotFoundError: there is no such object.
            StorageError: the store does not answer, or not with as many bytes, after all attempts.
        """
        import obstore
        from obstore import exceptions

        reason, pause = "", _FIRST_PAUSE_S
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(pause)
                pause *= 2
            try:
                if size is None:
                    return bytes(obstore.get(self._store, name).bytes())
                data = bytes(obstore.get_range(self._store, name, start=offset, length=size)) if size else b""
            except (exceptions.NotFoundError, FileNotFoundError) as error:
                raise FileNotFoundError(f"{self.url}/{name}") from error
            except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
                reason = _short(error)
                break
            except (exceptions.BaseError, OSError) as error:
                reason = _short(error)
                continue
            if len(data) == size:
                return data
            reason = f"{len(data)} bytes came instead of {size}"
        raise StorageError(
            f"reading {self.url}/{name}: {reason}. Nothing of it was used.",
            hint="check the endpoint and the credentials in the environment, then run again",
        )


def _open_store(url: str) -> Any:
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise UsageError(
            f"{url} is in an object store, which needs the package obstore. Nothing was read.",
            hint="install megamask with its extra: pip install 'megamask[objectstore]'",
        ) from error
    options: Any = {"timeout": _REQUEST_TIMEOUT, "connect_timeout": _CONNECT_TIMEOUT, "allow_http": True}
    backoff = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=5), "base": 2}
    retry: Any = {"max_retries": 5, "retry_timeout": timedelta(seconds=_RETRY_TIMEOUT_S), "backoff": backoff}
    try:
        return from_url(url, client_options=options, retry_config=retry)
    except Exception as error:
        raise UsageError(f"{url} cannot be opened: {_short(error)}. Nothing was read.") from error


def _short(error: Exception) -> str:
    """The first line of an error of the library, which shows its configuration below it."""
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
