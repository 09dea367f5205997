"""The sink as a thread beside training: fresh stores, outages, ends and silence."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from megamask.config.schema.tracking import MLflowConfig
from megamask.tracking.journal.writer import Journal
from megamask.tracking.mlflow import sink as mlflow_sink
from megamask.tracking.mlflow.session import Session
from megamask.tracking.mlflow.sink import MLflowSink
from megamask.tracking.mlflow.state import load_state, page_of_run
from support.mlflow_runs import DRAIN_S, history, make_run, send, stored_run, write_attempt

pytestmark = pytest.mark.usefixtures("quick_sink")


def test_runs_that_start_at_once_share_a_fresh_store(tmp_path: Path) -> None:
    names = ["a", "b"]
    for name in names:
        write_attempt(make_run(tmp_path, name), 1, range(1, 3), 0, is_done=True)
    script = """
import sys
from pathlib import Path
from megamask.config.schema.tracking import MLflowConfig
from megamask.tracking.mlflow.sink import MLflowSink
sink = MLflowSink(Path(sys.argv[1]), MLflowConfig(), on_incident=print)
sink.start()
print(sink.drain(120))
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path / name)], stdout=subprocess.PIPE, text=True)
        for name in names
    ]
    assert [process.communicate()[0] for process in processes] == ["True\n", "True\n"]
    runs = [stored_run(tmp_path, name) for name in names]
    assert len({run.info.experiment_id for run in runs}) == 1
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "mlartifacts", "mlflow.db"]


@pytest.mark.promise("a dead MLflow server is one incident; training goes on")
def test_dead_server_is_one_incident_and_training_goes_on(tmp_path: Path) -> None:
    with socket.socket() as probe:  # a port without a listener
        probe.bind(("127.0.0.1", 0))
        uri = f"http://user:secret@127.0.0.1:{probe.getsockname()[1]}/api?token=secret"
    run_dir = make_run(tmp_path, "dead")
    incidents: list[tuple[str, str]] = []
    sink = MLflowSink(run_dir, MLflowConfig(uri=uri), on_incident=lambda *incident: incidents.append(incident))
    sink.start()
    write_attempt(run_dir, 1, range(1, 50), 0)
    assert sink.drain(DRAIN_S) is False
    assert [name for name, _ in incidents] == ["mlflow_outage"]
    assert "refused" in incidents[0][1]
    assert "secret" not in incidents[0][1]
    assert load_state(run_dir) is None


@pytest.mark.promise("after an outage MLflow's history is complete, without duplicates")
def test_outage_ends_in_a_complete_history(output_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection fails three times in the middle; each outage is one incident, what it held back arrives."""
    run_dir = make_run(output_dir, "outage")
    connect = Session.open
    attempts: list[int] = []

    def flaky(*arguments: Any) -> Any:
        if arguments[0] != run_dir:  # the thread of an earlier test's sink may still try
            return connect(*arguments)
        attempts.append(1)
        if len(attempts) <= 3:
            raise ConnectionError("refused")
        return connect(*arguments)

    monkeypatch.setattr(Session, "open", flaky)
    monkeypatch.setattr(mlflow_sink, "_MAX_PAUSE_S", 0.01)
    incidents: list[tuple[str, str]] = []
    sink = MLflowSink(run_dir, MLflowConfig(), on_incident=lambda *incident: incidents.append(incident))
    sink.start()
    while not sink._has_worked:  # a sink that never did is not waited for
        threading.Event().wait(0.01)
    assert len(attempts) == 4
    write_attempt(run_dir, 1, range(1, 4), 0, is_done=True)
    assert sink.drain(DRAIN_S)
    assert len(incidents) == 1
    assert [step for step, _ in history(output_dir, "outage", "loss_nats_per_token")] == [1, 2, 3]


def test_incident_callback_that_raises_does_not_stop_the_sink(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "closed")
    journal = Journal.open(run_dir, 1)
    journal.close()
    sink = MLflowSink(run_dir, MLflowConfig(uri="env:MEGAMASK_NO_SUCH_VARIABLE"), on_incident=journal.incident)
    sink.start()
    assert sink.drain(DRAIN_S) is False


def test_drain_returns_in_time_when_the_store_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(Session, "open", lambda *_: release.wait(60))
    sink = MLflowSink(make_run(tmp_path, "hung"), MLflowConfig())
    sink.start()
    try:
        assert sink.drain(0.05) is False
    finally:
        release.set()
        sink.drain(DRAIN_S)  # its thread ends with this test, not beside the next one


def test_sink_that_was_never_started_has_sent_nothing(tmp_path: Path) -> None:
    assert MLflowSink(tmp_path, MLflowConfig()).drain(1.0) is False


def test_uri_may_come_from_the_environment(output_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKING", f"sqlite:///{output_dir / 'mlflow.db'}")
    run_dir = make_run(output_dir, "env")
    write_attempt(run_dir, 1, range(1, 2), 75)
    assert send(run_dir, config={"uri": "env:TRACKING", "experiment": "other"})
    assert stored_run(output_dir, "env").info.status == "KILLED"


def test_mlflow_is_silent(output_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run(output_dir, "silent")
    write_attempt(run_dir, 1, range(1, 2), 75)
    handlers = list(logging.getLogger().handlers)
    assert send(run_dir)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger().handlers == handlers


@pytest.mark.promise("MLflow that never took anything is not waited for at the end of a run")
def test_sink_that_never_worked_is_not_waited_for(output_dir: Path) -> None:
    run_dir = make_run(output_dir, "dead")
    write_attempt(run_dir, 1, range(1, 3), 0)
    refused = threading.Event()
    sink = MLflowSink(run_dir, MLflowConfig(uri="http://127.0.0.1:9"), on_incident=lambda kind, problem: refused.set())
    sink.start()
    assert refused.wait(120)
    patience: list[float] = []
    thread = sink._thread
    assert thread is not None
    thread.join = lambda timeout=None: patience.append(timeout)  # type: ignore[method-assign]
    assert not sink.drain(60.0)
    assert patience == [0.0]


@pytest.mark.promise("training ends with the address of the run's page in MLflow")
def test_page_of_a_run_is_its_own_page_and_names_the_server_to_start(output_dir: Path) -> None:
    run_dir = make_run(output_dir, "paged")
    assert page_of_run(run_dir) is None
    write_attempt(run_dir, 1, range(1, 3), 0)
    assert send(run_dir)
    info = stored_run(output_dir, "paged").info
    page = page_of_run(run_dir)
    assert page is not None
    address = f"http://127.0.0.1:5000/#/experiments/{info.experiment_id}/runs/{info.run_id}"
    assert page.startswith(f"{address}?workflowType=machine_learning after `mlflow ui --backend-store-uri sqlite:///")
