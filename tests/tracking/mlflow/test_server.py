"""The sink against a real server that is down, killed, stopped, failing or slow: in the end MLflow holds it all."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megamask.config.schema.tracking import MLflowConfig
from megamask.errors import StorageError
from megamask.runs.layout import mlflow_state_path
from megamask.tracking.journal.writer import Journal
from megamask.tracking.mlflow import sink as mlflow_sink
from megamask.tracking.mlflow import sync as mlflow_sync
from megamask.tracking.mlflow.session import Session
from megamask.tracking.mlflow.sink import MLflowSink
from megamask.tracking.mlflow.state import load_state, sending
from megamask.tracking.mlflow.store import environment
from megamask.tracking.mlflow.sync import Completed, complete
from support.mlflow_server import Proxy, Server, assert_whole, client, free_port, stored_models, stored_run, wait_until

pytestmark = pytest.mark.multiprocess

DRAIN_S = 240.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A sink that gives up a request soon and looks for news often; MLflow's environment stays in the test."""
    monkeypatch.chdir(tmp_path)
    for name, value in environment(timeout_s=5, retries=1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(mlflow_sink, "_SEND_EVERY_S", 0.05)
    monkeypatch.setattr(mlflow_sink, "_DRAIN_PAUSE_S", 0.05)
    monkeypatch.setattr(mlflow_sink, "_MAX_PAUSE_S", 0.2)


class Life:
    """A run whose journal a test writes, with a sink that follows it."""

    def __init__(self, folder: Path, name: str, uri: str, attempt: int = 1) -> None:
        self.run_dir = folder / name
        self.run_dir.mkdir(exist_ok=True)
        empty: dict[str, object] = {"extendable": {}, "corpora": {}, "laws": {}}
        record = {
            "format": "megamask-run",
            "version": 1,
            "run_id": f"{folder.name}/{name}",
            "identity": {"run.seed": 1},
            **empty,
        }
        (self.run_dir / "run.json").write_text(json.dumps(record))
        self.config = MLflowConfig(uri=uri)
        self.journal = Journal.open(self.run_dir, attempt)
        self.attempt = attempt
        self.incidents: list[str] = []
        self.sink = MLflowSink(
            self.run_dir, self.config, on_incident=lambda name, problem: self.incidents.append(problem)
        )
        self.journal.append("attempt_started", attempt=attempt)
        self.sink.start()

    def train(self, *steps: int) -> None:
        for step in steps:
            self.journal.append("step", step=step, loss=4.0 / step + self.attempt / 100, learning_rate=1e-3 * step)

    def commit(self, step: int) -> None:
        name = f"step-{step:08d}-a{self.attempt:04d}"
        folder = self.run_dir / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "COMMIT.json").write_text(f'{{"step":{step}}}')
        self.journal.append("checkpoint_committed", step=step, checkpoint=name, digest=f"d{step}", parent=None)

    def end(self) -> None:
        self.journal.append("attempt_ended", attempt=self.attempt, exit_code=0, phase="done")
        self.journal.append("run_completed")
        self.journal.close()

    def sync(self, uri: str | None = None) -> Completed:
        config = MLflowConfig(uri=uri) if uri else self.config
        return complete(self.run_dir, config, keeps_foreign_state=uri is not None, ended=lambda: None)

    def num_stored(self, uri: str) -> int:
        found = client(uri).get_experiment_by_name("megamask")
        if found is None:
            return 0
        runs = client(uri).search_runs(
            [found.experiment_id], filter_string=f"tags.`megamask.run_id` = '{self.run_dir.parent.name}/run'"
        )
        return len(client(uri).get_metric_history(runs[0].info.run_id, "loss_nats_per_token")) if runs else 0


@pytest.mark.promise("a server down from the start receives the full history by a sync")
def test_server_that_was_down_from_the_start_gets_the_whole_history_by_a_sync(server: Server, tmp_path: Path) -> None:
    port = free_port()
    life = Life(tmp_path, "run", f"http://127.0.0.1:{port}")
    life.train(1, 2, 3)
    life.commit(3)
    life.end()
    assert life.sink.drain(DRAIN_S) is False
    assert len(life.incidents) == 1
    proxy = Proxy(server.port, port)
    try:
        done = life.sync()
    finally:
        proxy.close()
    assert (done.num_steps, done.num_doubled_steps, done.num_checkpoints, done.status) == (3, 0, 1, "FINISHED")
    assert_whole(server.uri, life.run_dir, "FINISHED")


@pytest.mark.promise("a server killed and restarted during training misses nothing")
def test_server_that_was_killed_and_restarted_misses_nothing(server: Server, tmp_path: Path) -> None:
    life = Life(tmp_path, "run", server.uri)
    life.train(1, 2, 3)
    life.commit(3)
    wait_until(lambda: life.num_stored(server.uri) == 3)
    server.kill()
    life.train(4, 5)
    life.commit(5)
    wait_until(lambda: life.incidents)
    server.start()
    life.train(6)
    life.end()
    assert life.sink.drain(DRAIN_S)
    assert len(life.incidents) == 1
    assert_whole(server.uri, life.run_dir, "FINISHED")
    assert life.sync().num_records_sent == 0


@pytest.mark.promise("a server stopped and continued receives nothing twice")
def test_server_that_was_stopped_and_continued_doubles_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests to the stopped server wait in its socket: it carries it out when it goes on, after the retries."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    life = Life(tmp_path, "run", server.uri)
    life.train(1, 2)
    wait_until(lambda: life.num_stored(server.uri) == 2)
    server.signal(signal.SIGSTOP)
    try:
        life.train(3, 4)
        life.commit(4)
        life.end()
        assert life.sink.drain(DRAIN_S) is False
    finally:
        server.signal(signal.SIGCONT)
    assert len(life.incidents) == 1
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    life.sync()
    assert_whole(server.uri, life.run_dir, "FINISHED")


@pytest.mark.promise("responses of 500 are one outage, and nothing is lost")
def test_answers_of_500_are_one_outage_and_nothing_is_lost(server: Server, proxy: Proxy, tmp_path: Path) -> None:
    life = Life(tmp_path, "run", proxy.uri)
    life.train(1)
    wait_until(lambda: life.num_stored(server.uri) == 1)
    proxy.is_failing = True
    life.train(2, 3)
    life.commit(3)
    wait_until(lambda: life.incidents)
    proxy.is_failing = False
    life.end()
    assert life.sink.drain(DRAIN_S)
    assert len(life.incidents) == 1
    assert "500" in life.incidents[0]
    assert_whole(server.uri, life.run_dir, "FINISHED")


@pytest.mark.promise("a server that responds too late records each run and commit once")
def test_server_that_answers_too_late_enters_each_commit_once(
    server: Server, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow server does what it is asked, but the client has asked again by the time that it reports it."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    proxy.delay_s = 3.0
    life = Life(tmp_path, "run", proxy.uri)
    life.train(1, 2)
    life.commit(2)
    life.end()
    assert life.sink.drain(DRAIN_S) is False
    proxy.delay_s = 0.0
    proxy.released.set()
    life.sync()
    assert_whole(server.uri, life.run_dir, "FINISHED")


@pytest.mark.promise("a server that responds too late records each run and commit once")
def test_late_answers_to_the_creation_of_a_run_and_a_model_leave_one_of_each(server: Server, tmp_path: Path) -> None:
    """As if the requests of a client that has given up were carried out twice."""
    life = Life(tmp_path, "run", server.uri)
    life.train(1)
    life.commit(1)
    life.end()
    assert life.sink.drain(DRAIN_S)
    run = stored_run(server.uri, life.run_dir)
    [model] = stored_models(server.uri, run).values()
    store, tags = client(server.uri), {"checkpoint": model.tags["checkpoint"]}
    store.create_run(run.info.experiment_id, tags={"megamask.run_id": run.data.tags["megamask.run_id"]})
    store.create_logged_model(run.info.experiment_id, name=model.name, source_run_id=run.info.run_id, tags=tags)
    life.sync()
    assert_whole(server.uri, life.run_dir, "FINISHED")
    assert stored_run(server.uri, life.run_dir).info.run_id == run.info.run_id
    assert [kept.model_id for kept in stored_models(server.uri, run).values()] == [model.model_id]


@pytest.mark.promise("two concurrent runs each receive their own history")
def test_two_runs_at_once_each_get_their_own_history(server: Server, tmp_path: Path) -> None:
    lives = [Life(tmp_path, name, server.uri) for name in ("one", "two")]
    for step in range(1, 30):
        for life in lives:
            life.train(step)
    for life in lives:
        life.commit(29)
        life.end()
    assert [life.sink.drain(DRAIN_S) for life in lives] == [True, True]
    for life in lives:
        assert_whole(server.uri, life.run_dir, "FINISHED")


@pytest.mark.promise("an attempt after a crash continues in the same MLflow run")
def test_attempt_after_a_crash_goes_on_in_the_same_run(server: Server, tmp_path: Path) -> None:
    first = Life(tmp_path, "run", server.uri)
    first.train(1, 2, 3)
    first.commit(2)
    first.journal.close()  # no last line: killed
    assert first.sink.drain(DRAIN_S)
    assert stored_run(server.uri, first.run_dir).info.status == "RUNNING"
    second = Life(tmp_path, "run", server.uri, attempt=2)
    second.train(3, 4)
    second.commit(4)
    second.end()
    assert second.sink.drain(DRAIN_S)
    assert_whole(server.uri, second.run_dir, "FINISHED")


@pytest.mark.promise("a sync beside a running training duplicates nothing; the two take turns")
def test_sync_beside_a_living_sink_doubles_nothing(server: Server, tmp_path: Path) -> None:
    life = Life(tmp_path, "run", server.uri)
    synced: list[Completed] = []

    def sync_often() -> None:
        while len(synced) < 5:
            synced.append(life.sync())

    syncing = threading.Thread(target=sync_often)
    syncing.start()
    for step in range(1, 200):
        life.train(step)
        if step % 20 == 0:
            life.commit(step)
    life.end()
    syncing.join()
    assert life.sink.drain(DRAIN_S)
    assert_whole(server.uri, life.run_dir, "FINISHED")
    assert load_state(life.run_dir) is not None


@pytest.mark.promise("a sync beside a running training duplicates nothing; the two take turns")
def test_sync_waits_for_its_turn_and_says_who_keeps_it(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = Life(tmp_path, "run", server.uri)
    life.train(1)
    life.end()
    assert life.sink.drain(DRAIN_S)
    monkeypatch.setattr(mlflow_sync, "_TURN_TIMEOUT_S", 0.3)
    with sending(life.run_dir), pytest.raises(StorageError, match=r"another process .*mlflow\.lock"):
        life.sync()
    assert life.sync().num_steps == 1


@pytest.mark.promise("a sync to another server keeps the state of the first")
def test_sync_to_another_server_leaves_the_state_of_the_first(server: Server, tmp_path: Path) -> None:
    life = Life(tmp_path, "run", server.uri)
    life.train(1, 2)
    life.commit(2)
    life.end()
    assert life.sink.drain(DRAIN_S)
    before = mlflow_state_path(life.run_dir).read_bytes()
    other = f"sqlite:///{tmp_path}/other.db"
    for _ in range(2):
        assert life.sync(other).num_records_sent == 6
        assert_whole(other, life.run_dir, "FINISHED")
    assert mlflow_state_path(life.run_dir).read_bytes() == before
    assert (tmp_path / "mlartifacts").is_dir()


@pytest.mark.promise("a sync sends again what the server lost")
def test_sync_sends_again_what_the_server_lost(server: Server, tmp_path: Path) -> None:
    """The state records that all was sent; the server was set back to an older backup of its database."""
    life = Life(tmp_path, "run", server.uri)
    life.train(1, 2)
    life.end()
    assert life.sink.drain(DRAIN_S)
    state = load_state(life.run_dir)
    run = stored_run(server.uri, life.run_dir)
    client(server.uri).delete_run(run.info.run_id)
    session = Session.open(life.run_dir, life.config)  # a new run is there, and the state records that it is complete
    assert state is not None
    content = json.loads(mlflow_state_path(life.run_dir).read_bytes())
    content["position"] = {"file": state.position.file, "offset": state.position.offset}
    mlflow_state_path(life.run_dir).write_text(json.dumps(content))
    session.send_new()
    assert life.num_stored(server.uri) == 0
    life.sync()
    assert_whole(server.uri, life.run_dir, "FINISHED")


@pytest.mark.promise("a lost sync state duplicates no step")
def test_lost_state_keeps_the_point_that_stands_there(server: Server, tmp_path: Path) -> None:
    """A superseded writer added steps to an older file after they were sent from the newer one: not a second time."""
    first = Life(tmp_path, "run", server.uri)
    first.train(1)
    assert first.sink.drain(DRAIN_S)
    second = Life(tmp_path, "run", server.uri, attempt=2)
    second.train(2, 3)
    second.end()
    assert second.sink.drain(DRAIN_S)
    first.train(2)  # the orphan of attempt 1
    first.journal.close()
    mlflow_state_path(first.run_dir).unlink()
    assert second.sync().num_doubled_steps == 0


@pytest.mark.promise("the credential of a tracking uri is written nowhere")
def test_refusal_names_the_server_without_its_credential(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKING", f"http://anna:hunter2@127.0.0.1:{free_port()}/api?token=hunter3")
    life = Life(tmp_path, "run", "env:TRACKING")
    life.train(1)
    life.end()
    assert life.sink.drain(DRAIN_S) is False
    with pytest.raises(StorageError, match=r"MLflow at http://127\.0\.0\.1:\d+/api does not take") as refused:
        life.sync()
    reported = [str(refused.value), *life.incidents, *map(str, refused.value.details.values())]
    kept = [path.read_text() for path in life.run_dir.rglob("*") if path.is_file()]
    assert not [text for text in reported + kept if "hunter" in text]


@pytest.mark.promise("the credential of a tracking uri is written nowhere")
def test_credential_of_the_uri_stands_nowhere(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACKING", server.uri.replace("//", "//anna:hunter2@"))
    life = Life(tmp_path, "run", "env:TRACKING")
    life.train(1)
    life.commit(1)
    life.end()
    assert life.sink.drain(DRAIN_S)
    run = stored_run(server.uri, life.run_dir)
    models = stored_models(server.uri, run).values()
    shown: list[Any] = [run.data.tags, run.data.params, *(m.tags for m in models), *(m.params for m in models)]
    shown += [path.read_text() for path in life.run_dir.rglob("*") if path.is_file()]
    assert "hunter" not in repr(shown)
    assert capfd.readouterr() == ("", "")
    state = load_state(life.run_dir)
    assert state is not None
    assert state.uri == server.uri
