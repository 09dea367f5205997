from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megamask.config.schema.tracking import MLflowConfig
from megamask.runs.layout import mlflow_state_path
from megamask.tracking.journal.writer import Journal
from megamask.tracking.mlflow import sink as mlflow_sink
from megamask.tracking.mlflow.session import Session
from megamask.tracking.mlflow.sink import MLflowSink
from megamask.tracking.mlflow.state import load_state, page_of_run
from megamask.tracking.mlflow.store import environment

DRAIN_S = 240.0


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of runs, hence one SQLite store, for the whole file: creating the schema takes seconds."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Environment changes of the sink stay in the test, it looks for news often, and MLflow's own folders stay out."""
    monkeypatch.chdir(tmp_path)
    for name, value in environment(timeout_s=5, retries=1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(mlflow_sink, "_SEND_EVERY_S", 0.05)
    monkeypatch.setattr(mlflow_sink, "_DRAIN_PAUSE_S", 0.05)
    yield


def make_run(output_dir: Path, name: str, **changes: Any) -> Path:
    run_dir = output_dir / name
    (run_dir / "config").mkdir(parents=True)
    record = {
        "format": "megamask-run",
        "version": 1,
        "laws": {},
        "run_id": f"id-of-{name}",
        "identity": {"model.num_layers": 2, "run.seed": 7, "objective.noise_schedule": "linear"},
        "extendable": {"training.steps": 4},
        "corpora": {"main": "c0ffee"},
        "tokenizer_digest": "70cken",
        "code_version": "v1",
        **changes,
    }
    (run_dir / "run.json").write_text(json.dumps(record))
    return run_dir


def write_attempt(run_dir: Path, attempt: int, steps: range, exit_code: int | None, *, is_done: bool = False) -> None:
    (run_dir / "config" / f"attempt-{attempt:04d}.yaml").write_text(f"attempt: {attempt}\n")
    with Journal.open(run_dir, attempt) as journal:
        journal.append("attempt_started", attempt=attempt)
        for step in steps:
            journal.append("step", step=step, loss=4.0 / step, grad_norm=float("nan"), seconds={"data": 0.25})
        last = steps[-1]
        journal.append("evaluation", step=last, nelbo_nats_per_token=5.0, standard_error=0.1, split="validation")
        journal.append("checkpoint_committed", step=last, digest=f"d{last}")
        if exit_code is not None:
            journal.append("attempt_ended", attempt=attempt, exit_code=exit_code, step=last)
        if is_done:
            journal.append("run_completed", step=last)


def send(run_dir: Path, **options: Any) -> bool:
    sink = MLflowSink(run_dir, MLflowConfig(**options.pop("config", {})), **options)
    sink.start()
    return sink.drain(DRAIN_S)


def client(output_dir: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{output_dir / 'mlflow.db'}")


def stored_run(output_dir: Path, name: str) -> Any:
    """The one MLflow run with this run's tag."""
    store = client(output_dir)
    experiments = [experiment.experiment_id for experiment in store.search_experiments()]
    (run,) = store.search_runs(experiments, filter_string=f"tags.`megamask.run_id` = 'id-of-{name}'")
    return run


def history(output_dir: Path, name: str, key: str) -> list[tuple[int, float]]:
    run = stored_run(output_dir, name)
    points = client(output_dir).get_metric_history(run.info.run_id, key)
    return sorted((point.step, point.value) for point in points)


def test_run_shows_params_metrics_tags_and_config(output_dir: Path) -> None:
    run_dir = make_run(output_dir, "whole")
    write_attempt(run_dir, 1, range(1, 5), 0, is_done=True)
    assert send(run_dir)
    run = stored_run(output_dir, "whole")
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "whole"
    assert run.data.params == {"model.num_layers": "2", "run.seed": "7", "objective.noise_schedule": "linear"}
    assert history(output_dir, "whole", "loss_nats_per_token") == [(1, 4.0), (2, 2.0), (3, 4.0 / 3), (4, 1.0)]
    assert history(output_dir, "whole", "step_time_s/data")[-1] == (4, 0.25)
    assert history(output_dir, "whole", "validation_bound_nats_per_token") == [(4, 5.0)]
    tags = {key: value for key, value in run.data.tags.items() if not key.startswith("mlflow.")}
    assert tags.pop("journal_head").split(":")[0].isdecimal()
    assert run.data.tags["mlflow.source.name"] == "megamask train"
    assert "`megamask verify run RUN --against-mlflow`" in run.data.tags["mlflow.note.content"]
    assert tags == {
        "megamask.run_id": "id-of-whole",
        "run_dir": str(run_dir),
        "corpus.main": "c0ffee",
        "tokenizer_digest": "70cken",
        "code_version": "v1",
        "training.steps": "4",
        "attempts": "1",
        "last_commit.step": "4",
        "last_commit.digest": "d4",
    }
    artifacts = output_dir / "mlartifacts" / run.info.run_id / "artifacts" / "config"
    assert [path.name for path in artifacts.iterdir()] == ["attempt-0001.yaml"]


@pytest.mark.promise("commits and datasets are browsable in MLflow, and a pruned commit remains")
@pytest.mark.promise("MLflow's registered model of a run has a version for each commit and the alias `best`")
def test_commits_datasets_and_previews_are_entered_and_a_pruned_commit_stays(output_dir: Path) -> None:
    run_dir = make_run(output_dir, "entries")
    dataset = {"name": "main", "split": "train", "corpus_id": "ab" * 32, "source": "/data", "rows": 3, "tokens": 40}
    names = [f"step-{step:08d}-a0001" for step in (1, 2)]
    with Journal.open(run_dir, 1) as journal:
        journal.append("attempt_started", attempt=1, datasets=[dataset])
        for step, name in enumerate(names, 1):
            folder = run_dir / "checkpoints" / name
            folder.mkdir(parents=True)
            (folder / "COMMIT.json").write_text(str(step))
            bound = {"nelbo_nats_per_token": 5.0 - step, "standard_error": 0.5}
            journal.append("checkpoint_committed", step=step, checkpoint=name, digest=f"d{step}", evaluation=bound)
            journal.append("sample_preview", step=step, samples=[{"prompt": "", "text": f"text {step}"}])
        journal.append("checkpoint_pruned", step=2, checkpoint=names[0])
    assert send(run_dir)
    mlflow_state_path(run_dir).unlink()
    assert send(run_dir)  # all of it once more
    store, run = client(output_dir), stored_run(output_dir, "entries")
    [entered] = run.inputs.dataset_inputs
    assert (entered.dataset.name, entered.dataset.digest) == ("main/train", ("ab" * 32)[:36])
    models = {
        model.tags["checkpoint"]: model
        for model in store.search_logged_models(
            [run.info.experiment_id], filter_string=f"source_run_id = '{run.info.run_id}'"
        )
    }
    assert sorted(models) == names
    assert [models[name].tags["state"] for name in names] == ["pruned", "committed"]
    for step, name in enumerate(names, 1):
        measured = {metric.key: metric.value for metric in models[name].metrics}
        assert measured == {
            "checkpoint/bound_nats_per_token": 5.0 - step,
            "checkpoint/standard_error_nats_per_token": 0.5,
        }
        [kept] = store.list_logged_model_artifacts(models[name].model_id)
        assert kept.path == "COMMIT.json"
    versions = store.search_model_versions(f"name = 'entries-{run.data.tags['megamask.run_id'][:8]}'")
    assert {int(version.version): version.tags["checkpoint"] for version in versions} == dict(enumerate(names, 1))
    assert int(store.get_model_version_by_alias(versions[0].name, "best").version) == 2
    assert [version.tags["state"] for version in sorted(versions, key=lambda v: int(v.version))] == [
        "pruned",
        "committed",
    ]
    assert store.get_model_version_download_uri(versions[0].name, "2").startswith("file:")
    artifacts = output_dir / "mlartifacts" / run.info.run_id / "artifacts" / "previews"
    assert sorted(path.name for path in artifacts.iterdir()) == ["step-00000001.txt", "step-00000002.txt"]
    assert "text 2" in (artifacts / "step-00000002.txt").read_text()
    assert history(output_dir, "entries", "checkpoint/bound_nats_per_token") == [(1, 4.0), (2, 3.0)]


@pytest.mark.parametrize(
    ("exit_code", "is_done", "status"),
    [
        (0, True, "FINISHED"),
        (0, False, "KILLED"),
        (75, False, "KILLED"),
        (66, False, "FAILED"),
        (None, False, "RUNNING"),
    ],
)
def test_status_is_truthful(output_dir: Path, exit_code: int | None, is_done: bool, status: str) -> None:
    name = f"status-{exit_code}-{is_done}"
    run_dir = make_run(output_dir, name)
    write_attempt(run_dir, 1, range(1, 2), exit_code, is_done=is_done)
    assert send(run_dir)
    assert stored_run(output_dir, name).info.status == status


def test_resumed_attempt_continues_the_same_run_without_duplicates(output_dir: Path) -> None:
    run_dir = make_run(output_dir, "resumed")
    write_attempt(run_dir, 1, range(1, 5), 75)
    assert send(run_dir)
    assert stored_run(output_dir, "resumed").info.status == "KILLED"
    write_attempt(run_dir, 2, range(3, 8), None)  # from the checkpoint of step 2: 3 and 4 again
    assert send(run_dir)
    run = stored_run(output_dir, "resumed")
    assert run.info.status == "RUNNING"
    assert run.data.tags["attempts"] == "2"
    assert history(output_dir, "resumed", "loss_nats_per_token") == [(step, 4.0 / step) for step in range(1, 8)]
    artifacts = output_dir / "mlartifacts" / run.info.run_id / "artifacts" / "config"
    assert sorted(path.name for path in artifacts.iterdir()) == ["attempt-0001.yaml", "attempt-0002.yaml"]


@pytest.mark.promise("after an outage MLflow's history is complete, without duplicates")
def test_lost_state_finds_the_run_again_and_doubles_nothing(output_dir: Path) -> None:
    run_dir = make_run(output_dir, "lost")
    write_attempt(run_dir, 1, range(1, 4), 75)
    assert send(run_dir)
    before = stored_run(output_dir, "lost").info.run_id
    mlflow_state_path(run_dir).unlink()
    write_attempt(run_dir, 2, range(3, 5), 0, is_done=True)
    assert send(run_dir)
    run = stored_run(output_dir, "lost")
    assert run.info.run_id == before
    assert run.info.status == "FINISHED"
    assert [step for step, _ in history(output_dir, "lost", "loss_nats_per_token")] == [1, 2, 3, 4]
    assert len(history(output_dir, "lost", "optimizer/grad_norm")) == 4


def test_deleted_run_is_made_anew_with_its_whole_history(output_dir: Path) -> None:
    run_dir = make_run(output_dir, "deleted")
    write_attempt(run_dir, 1, range(1, 3), 75)
    assert send(run_dir)
    client(output_dir).delete_run(stored_run(output_dir, "deleted").info.run_id)
    write_attempt(run_dir, 2, range(3, 4), None)
    assert send(run_dir)
    assert [step for step, _ in history(output_dir, "deleted", "loss_nats_per_token")] == [1, 2, 3]


@pytest.mark.promise("a deleted experiment is restored for the next run")
def test_deleted_experiment_is_restored_and_takes_the_next_run(output_dir: Path) -> None:
    first = make_run(output_dir, "before")
    write_attempt(first, 1, range(1, 3), 0, is_done=True)
    assert send(first, config={"experiment": "once-deleted"})
    store = client(output_dir)
    store.delete_experiment(store.get_experiment_by_name("once-deleted").experiment_id)
    second = make_run(output_dir, "after")
    write_attempt(second, 1, range(1, 3), 0, is_done=True)
    assert send(second, config={"experiment": "once-deleted"})
    assert store.get_experiment_by_name("once-deleted").lifecycle_stage == "active"
    assert stored_run(output_dir, "after").info.status == "FINISHED"


def test_parameter_that_is_written_otherwise_later_keeps_its_first_value(output_dir: Path) -> None:
    """MLflow refuses to change a parameter; a later version that writes the same setting otherwise still sends."""
    run_dir = make_run(output_dir, "params", identity={"optimizer.eps": "1e-8"})
    write_attempt(run_dir, 1, range(1, 2), 75)
    assert send(run_dir)
    record = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps({**record, "identity": {"optimizer.eps": 1e-08}}))
    write_attempt(run_dir, 2, range(2, 3), 75)
    assert send(run_dir)
    assert stored_run(output_dir, "params").data.params == {"optimizer.eps": "1e-8"}


def test_backlog_longer_than_a_batch_arrives_whole(output_dir: Path) -> None:
    run_dir = make_run(output_dir, "long")
    write_attempt(run_dir, 1, range(1, 801), 75)  # 3 points a step
    assert send(run_dir)
    assert [step for step, _ in history(output_dir, "long", "loss_nats_per_token")] == list(range(1, 801))


def test_value_too_long_for_a_parameter_is_named_and_not_cut(output_dir: Path) -> None:
    run_dir = make_run(output_dir, "wordy", identity={"data.corpora": "x" * 7000})
    write_attempt(run_dir, 1, range(1, 2), 75)
    assert send(run_dir)
    assert stored_run(output_dir, "wordy").data.params["data.corpora"] == "(7000 characters: see the config artifact)"


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
    with socket.socket() as probe:  # a port that nobody listens on
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
        attempts.append(1)
        if len(attempts) <= 3:
            raise ConnectionError("refused")
        return connect(*arguments)

    monkeypatch.setattr(Session, "open", flaky)
    monkeypatch.setattr(mlflow_sink, "_LONGEST_PAUSE_S", 0.01)
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
