"""A real MLflow server on SQLite, a proxy in front of it that misbehaves on demand, and what a complete history is."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from megamask.tracking.journal.lines import read_journal
from megamask.tracking.mlflow.registry import registered_name

_STARTS = 3
_START_TIMEOUT_S = 180.0


def free_port() -> int:
    """A port without a listener just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(what: Callable[[], Any], timeout_s: float = 120.0) -> None:
    """Polls until `what` is true."""
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


class Server:
    """`mlflow server` in a process group of its own, on a SQLite file that outlives it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0
        for _ in range(_STARTS):  # another process may take the port before the server does
            self.port = free_port()
            with contextlib.suppress(ChildProcessError):
                self.start()
                return
        raise AssertionError(f"no server came up; see {folder / 'server.log'}")

    @property
    def uri(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def database(self) -> Path:
        """Its SQLite file."""
        return self._folder / "mlflow.db"

    def start(self) -> None:
        """Starts it on its port and waits until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db", "--workers", "1"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **quiet}, start_new_session=True, cwd=self._folder
            )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None:
                raise ChildProcessError("the server ended")
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError, http.client.HTTPException):
            return False

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to all of its processes: SIGSTOP hangs it, SIGCONT lets it go on."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """Ends it at once, as a dead node would."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


class Proxy:
    """Proxy of a server: it passes requests on, answers 500 itself, or passes the answers on too late.

    Args:
        port: where to listen; None takes a free one.
    """

    def __init__(self, upstream: int, port: int | None = None) -> None:
        self.is_failing = False
        self.delay_s = 0.0
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if proxy.is_failing:
                    return self._answer(500, {"Content-Type": "text/plain"}, b"out of order")
                connection = http.client.HTTPConnection("127.0.0.1", upstream, timeout=120)
                connection.request(self.command, self.path, body, dict(self.headers.items()))
                answer = connection.getresponse()
                content = answer.read()
                connection.close()
                proxy.released.wait(proxy.delay_s)  # the server has done it; who asked does not know
                kept = {name: value for name, value in answer.getheaders() if name.lower() == "content-type"}
                return self._answer(answer.status, kept, content)

            def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
                with contextlib.suppress(OSError):  # the client has given up
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do

            def log_message(self, *_: object) -> None:
                pass

        self.released = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", port or 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def uri(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        """Stops listening."""
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


def client(uri: str) -> Any:
    """A client of MLflow."""
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def stored_run(uri: str, run_dir: Path, experiment: str = "megamask") -> Any:
    """The one MLflow run of a run directory."""
    run_id = json.loads((run_dir / "run.json").read_bytes())["run_id"]
    store = client(uri)
    found = store.get_experiment_by_name(experiment)
    [run] = store.search_runs([found.experiment_id], filter_string=f"tags.`megamask.run_id` = '{run_id}'")
    return run


def stored_models(uri: str, run: Any) -> dict[str, Any]:
    """The models of an MLflow run by the folder name of their commit; a double is an error."""
    models = client(uri).search_logged_models(
        [run.info.experiment_id], filter_string=f"source_run_id = '{run.info.run_id}'", max_results=1000
    )
    names = Counter(model.tags["checkpoint"] for model in models)
    assert set(names.values()) <= {1}, names
    return {model.tags["checkpoint"]: model for model in models}


def registered_checkpoints(uri: str, run: Any) -> list[str]:
    """Commits that a run has registered, in the order of their versions."""
    name = registered_name(run.info.run_name, run.data.tags["megamask.run_id"])
    versions = client(uri).search_model_versions(f"name = '{name}'", max_results=10000)
    own = sorted(
        (int(version.version), version.tags["checkpoint"]) for version in versions if version.run_id == run.info.run_id
    )
    return [checkpoint for _, checkpoint in own]


def assert_whole(uri: str, run_dir: Path, status: str, experiment: str = "megamask") -> None:
    """MLflow holds what the journal holds: every step once, as the first attempt took it, every commit, the status."""
    run = stored_run(uri, run_dir, experiment)
    records = list(read_journal(run_dir))
    first: dict[int, dict[str, Any]] = {}
    for record in records:
        if record["kind"] == "step":
            first.setdefault(record["step"], record)
    assert first
    store = client(uri)
    for key, name in (("loss_nats_per_token", "loss"), ("optimizer/learning_rate", "learning_rate")):
        points = sorted((p.step, p.value) for p in store.get_metric_history(run.info.run_id, key))
        assert points == [(step, record[name]) for step, record in sorted(first.items())], key
    committed = {r["checkpoint"]: r["digest"] for r in records if r["kind"] == "checkpoint_committed"}
    models = stored_models(uri, run)
    assert {name: model.params["digest"] for name, model in models.items()} == committed
    for model in models.values():  # a checkpoint that is gone does not look ready
        assert str(model.status) == ("UNSPECIFIED" if model.tags["state"] == "pruned" else "READY"), model.tags
    assert {output.model_id for output in run.outputs.model_outputs} == {m.model_id for m in models.values()}
    registered = registered_checkpoints(uri, run)
    assert registered == [r["checkpoint"] for r in records if r["kind"] == "checkpoint_committed"], registered
    assert run.info.status == status
