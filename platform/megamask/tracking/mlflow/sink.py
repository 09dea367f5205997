"""The MLflow reader of the journal: a side thread that sends what is journalled, and never blocks or fails training.

It follows the journal's files from a remembered place, so an outage, a crash or a lost state delay what MLflow shows
and lose nothing. One MLflow run holds all attempts of a run.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from megamask.config.schema.tracking import MLflowConfig
from megamask.errors import UsageError
from megamask.resilience import daemon_threads
from megamask.tracking.mlflow.session import Session
from megamask.tracking.mlflow.state import BusyError
from megamask.tracking.mlflow.store import prepare_environment, store_of, without_credentials

_SEND_EVERY_S = 2.0
_MAX_PAUSE_S = 30.0
_DRAIN_ATTEMPTS = 2
_DRAIN_PAUSE_S = 0.5
# A request fails soon: the journal is patient, and an attempt that ends is not kept waiting.
_REQUEST_TIMEOUT_S = 5
_REQUEST_RETRIES = 1

_log = logging.getLogger(__name__)


class MLflowSink:
    """Sends a run's journal to MLflow from a daemon thread; every method returns at once but `drain`, which is bounded.

    Args:
        run_dir: the run directory; its run.json gives parameters and tags.
        config: where to send; a null uri is a SQLite file beside the run directories.
        on_incident: called with (name, sentence) once per outage, from the sink's thread; Journal.incident fits.
        redact: hides credentials in error texts that others wrote.
    """

    def __init__(
        self,
        run_dir: Path,
        config: MLflowConfig,
        *,
        on_incident: Callable[[str, str], object] | None = None,
        redact: Callable[[str], str] = str,
    ) -> None:
        self._run_dir = run_dir.resolve()
        self._config = config
        self._on_incident = on_incident
        self._redact = redact
        self._session: Session | None = None
        self._thread: threading.Thread | None = None
        self._is_draining = threading.Event()
        self._is_out = False
        self._is_busy = False
        self._has_sent_all = False
        self._has_worked = False

    def start(self) -> None:
        """Start the thread; MLflow is imported there (it takes seconds)."""
        if self._thread is None:
            prepare_environment(timeout_s=_REQUEST_TIMEOUT_S, retries=_REQUEST_RETRIES)
            self._thread = threading.Thread(target=self._run, name="megamask-mlflow", daemon=True)
            daemon_threads.watch(self._thread)
            self._thread.start()

    def drain(self, timeout_s: float) -> bool:
        """Wait until everything journalled so far is sent, a dead server has been tried twice, or the time is up.

        A server that has refused and has never taken anything is not waited for.

        Returns:
            Whether everything was sent; if not, the next attempt of the run sends the rest.
        """
        if self._thread is None:
            return False
        self._is_draining.set()
        never_worked = self._is_out and not self._has_worked
        self._thread.join(0.0 if never_worked else max(0.0, timeout_s))
        return self._has_sent_all and not self._thread.is_alive()

    def _run(self) -> None:
        failures = last_failures = 0
        while last_failures < _DRAIN_ATTEMPTS:
            is_last = self._is_draining.is_set()  # looked at before sending: what was journalled by then is sent
            if self._send_what_is_new():
                if is_last:
                    self._has_sent_all = True
                    return
                failures = 0
                self._is_draining.wait(_SEND_EVERY_S)
            elif is_last:
                last_failures += not self._is_busy  # who takes turns with a sync is not refused
                time.sleep(_DRAIN_PAUSE_S)
            else:
                failures += 1
                self._is_draining.wait(min(_MAX_PAUSE_S, 2.0 ** min(failures, 10) / 2))

    def _send_what_is_new(self) -> bool:
        try:
            if self._session is None:
                self._session = Session.open(self._run_dir, self._config)
            self._has_worked = True
            self._session.send_new()
        except BusyError:  # a `megamask sync` sends the same just now: no outage
            self._is_busy = True
            return False
        except Exception as error:  # noqa: BLE001  any error of MLflow, its database or the network: training continues
            self._is_busy = False
            self._session = None  # a new connection asks the server again which run this is
            self._report(error)
            return False
        self._is_out = False
        return True

    def _report(self, error: Exception) -> None:
        if self._is_out:
            return
        self._is_out = True
        text = outage_text(error, self._run_dir, self._config, redact=self._redact)
        problem = f"MLflow takes nothing ({type(error).__name__}: {text}). Training goes on, the journal is sent later."
        _log.warning(problem)
        if self._on_incident is not None:
            try:
                self._on_incident("mlflow_outage", problem)
            except Exception as failure:  # noqa: BLE001  the journal may be closed or its disk full; it reports that itself
                _log.warning("the outage was not journalled: %r", failure)


def outage_text(
    error: BaseException, run_dir: Path, config: MLflowConfig, *, redact: Callable[[str], str] = str
) -> str:
    """Return the text of an MLflow error on one line, without a credential that its uri may contain."""
    text = " ".join(str(error).split())
    with contextlib.suppress(UsageError):  # a variable that is not set has no credential to hide
        text = without_credentials(text, store_of(run_dir, config).uri)
    return redact(text)[:500]  # in this order: half a credential is not recognised
