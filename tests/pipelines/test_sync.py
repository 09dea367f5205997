"""`megamask sync`: what MLflow is missing of a run, sent afterwards; and training while the server is in trouble."""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megamask.runs.claims import claim
from megamask.runs.status import Status, write_status
from megamask.tracking.journal.writer import Journal
from megamask_pipelines.cli.main import main
from support.command import TINY, journal, megamask, start, tiny
from support.mlflow_server import Proxy, Server, assert_whole, client, free_port, stored_run, wait_until

RUN_JSON = {
    "format": "megamask-run",
    "version": 1,
    "identity": {"run.seed": 1},
    "extendable": {"training.steps": 3},
    "corpora": {"main": "cd" * 32},
    "tokenizer_digest": "ef" * 32,
    "code_version": "0",
    "laws": {},
    "parent_checkpoint": None,
}
STEPS = ("training.steps=40", "checkpoint.every_steps=10", "optimizer.warmup_steps=3")


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of three steps, without a config of an attempt."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "old"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({**RUN_JSON, "run_id": tmp_path.name}))
    with Journal.open(folder, 1) as lines:
        lines.append("attempt_started", attempt=1)
        for step in (1, 2, 3):
            lines.append("step", step=step, loss=3.0 / step, learning_rate=0.1)
        lines.append("attempt_ended", attempt=1, exit_code=75, phase="preempted")
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A SQLite store for several tests: creating the schema takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


def configured(run_dir: Path, *lines: str) -> Path:
    """The run with the config of an attempt that had these lines under tracking.mlflow."""
    (run_dir / "config").mkdir(exist_ok=True)
    text = [f"defaults: [{json.dumps(str(TINY))}]", "tracking:", "  mlflow:"]
    (run_dir / "config" / "attempt-0001.yaml").write_text("\n".join([*text, *(f"    {line}" for line in lines)]))
    return run_dir


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(["sync", *arguments])
    return code, capsys.readouterr().err


@pytest.mark.promise("a sync ends with 74 if the server does not accept it, 2 without a run or a target")
def test_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, message = refusal(capsys, str(tmp_path))
    assert code == 2
    assert "run.json" in message


@pytest.mark.promise("a sync ends with 74 if the server does not accept it, 2 without a run or a target")
@pytest.mark.parametrize("lines", [None, ("enabled: false",)])
def test_run_whose_tracking_never_had_a_target_is_refused(
    run_dir: Path, capsys: pytest.CaptureFixture[str], lines: tuple[str, ...] | None
) -> None:
    if lines is not None:
        configured(run_dir, *lines)
    code, message = refusal(capsys, str(run_dir))
    assert code == 2
    assert "no MLflow to send to" in message
    assert "--uri" in message
    assert not (run_dir / "tracking").exists()


@pytest.mark.parametrize(
    ("uri", "word"),
    [
        ("http://anna:hunter2@127.0.0.1:5000", "carries a credential"),
        ("runs/mlflow.db", "not a tracking store"),
        ("file:///runs", "not a tracking store"),
        ("env:MEGAMASK_NO_SUCH_VARIABLE", "not set"),
        ("env:", "env:NAME"),
    ],
)
def test_uri_that_cannot_be_one_is_refused(
    run_dir: Path, capsys: pytest.CaptureFixture[str], uri: str, word: str
) -> None:
    code, message = refusal(capsys, str(run_dir), "--uri", uri)
    assert code == 2
    assert word in message
    assert "hunter2" not in message
    assert not (run_dir / "tracking").exists()


@pytest.mark.promise("a tracking uri that is not a store is refused")
def test_training_refuses_a_uri_that_is_no_tracking_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["train", *tiny(tmp_path, tmp_path, "wrong"), "tracking.mlflow.enabled=true", "tracking.mlflow.uri=x"])
    assert code == 2
    assert "tracking.mlflow.uri is not a tracking store" in capsys.readouterr().err


@pytest.mark.promise("a sync writes nothing that contradicts MLflow, and ends with 65 where something does")
def test_commit_that_mlflow_has_with_another_digest_ends_with_65_and_nothing_is_sent(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri, digest = f"sqlite:///{tmp_path}/mlflow.db", "ab" * 32
    with Journal.open(run_dir, 2) as lines:
        lines.append("attempt_started", attempt=2)
        lines.append("checkpoint_committed", step=3, checkpoint="step-00000003-a0002", digest=digest)
    assert main(["sync", str(run_dir), "--uri", uri]) == 0
    before = (tmp_path / "mlflow.db").read_bytes()
    for path in (run_dir / "journal").iterdir():
        path.write_text(path.read_text().replace(digest, "0" * 64))
    capsys.readouterr()
    assert main(["sync", str(run_dir), "--uri", uri]) == 65
    error = capsys.readouterr().err
    assert f"digest is '{digest}'; the journal has '{'0' * 64}'" in error
    assert "Nothing was sent" in error
    assert (tmp_path / "mlflow.db").read_bytes() == before


@pytest.mark.promise("a sync ends with 74 if the server does not accept it, 2 without a run or a target")
def test_dead_server_ends_with_74_and_says_what_to_do(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configured(run_dir, f"uri: http://127.0.0.1:{free_port()}")
    code, message = refusal(capsys, str(run_dir))
    assert code == 74
    assert "does not take the journal" in message
    assert "megamask sync" in message


@pytest.mark.promise("a run made with tracking off can be sent")
def test_run_made_with_tracking_off_is_sent_whole_and_once(
    run_dir: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    configured(run_dir, "enabled: false")
    for num_sent in (5, 0):
        assert main(["sync", str(run_dir), "--uri", store, "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert (answer["records_sent"], answer["steps"], answer["doubled_steps"]) == (num_sent, 3, 0)
        assert (answer["uri"], answer["status"]) == (store, "KILLED")
        assert_whole(store, run_dir, "KILLED")


@pytest.mark.promise("a preview appears in MLflow once per step after two attempts and a sync")
def test_preview_stands_once_per_step_after_two_attempts_and_a_sync(run_dir: Path, store: str, tmp_path: Path) -> None:
    """Attempt 3 takes step 4 again, with its preview, and one more; then what was remembered of the sending is lost."""
    for attempt, steps in ((2, (4,)), (3, (4, 5))):
        with Journal.open(run_dir, attempt) as lines:
            lines.append("attempt_started", attempt=attempt)
            for step in steps:
                sample = {"prompt": "def ", "text": f"f{step}(x):", "num_tokens": 4, "nfe": 2}
                lines.append("step", step=step, loss=3.0 / step, learning_rate=0.1)
                lines.append("sample_preview", step=step, samples=[sample], denoising_steps=2, temperature=0.0)
        assert main(["sync", str(run_dir), "--uri", store]) == 0
    shutil.rmtree(run_dir / "tracking")
    assert main(["sync", str(run_dir), "--uri", store]) == 0
    run = stored_run(store, run_dir)
    found = [file.path for file in client(store).list_artifacts(run.info.run_id, "previews")]
    assert sorted(found) == ["previews/step-00000004.txt", "previews/step-00000005.txt"]
    for step in (4, 5):
        text = Path(client(store).download_artifacts(run.info.run_id, f"previews/step-{step:08d}.txt", tmp_path))
        assert f'prompt "def ", 4 tokens, 2 forward passes\nf{step}(x):' in text.read_text()


@pytest.mark.promise("an attempt without a final line has its launcher's status")
@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (None, "RUNNING"),  # this very process holds the claim
        (Status(attempt=1, phase="failed", exit_code=1), "FAILED"),
        (Status(attempt=1, phase="preempted", exit_code=75), "KILLED"),
        (Status(attempt=1, phase="done", exit_code=0), "FINISHED"),
    ],
)
def test_attempt_without_a_last_line_has_the_status_that_its_launcher_left(
    run_dir: Path, store: str, status: Status | None, expected: str
) -> None:
    [file] = (run_dir / "journal").iterdir()
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    claim(run_dir)
    if status is not None:
        write_status(run_dir, status)
    assert main(["sync", str(run_dir), "--uri", store]) == 0
    assert_whole(store, run_dir, expected)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


def tracked(corpus: Path, runs: Path, uri: str, *overrides: str) -> list[str]:
    return [
        *tiny(corpus, runs, "run", *STEPS),
        "tracking.mlflow.enabled=true",
        f"tracking.mlflow.uri={uri}",
        *overrides,
    ]


@pytest.mark.promise("a stopped server changes nothing for training")
@pytest.mark.multiprocess
def test_stopped_server_changes_nothing_for_training_and_a_sync_completes_the_history(
    server: Server, small_corpus: Path, tmp_path: Path
) -> None:
    server.signal(signal.SIGSTOP)
    try:
        done = megamask("train", *tracked(small_corpus, tmp_path, server.uri, "tracking.mlflow.drain_timeout_s=1"))
    finally:
        server.signal(signal.SIGCONT)
    assert done.code == 0, done.stderr
    synced = megamask("sync", tmp_path / "run", "--json")
    assert synced.code == 0, synced.stderr
    assert (synced.json["steps"], synced.json["status"]) == (40, "FINISHED")
    assert_whole(server.uri, tmp_path / "run", "FINISHED")


@pytest.mark.promise("an attempt after a crash continues in the same MLflow run")
@pytest.mark.multiprocess
def test_killed_attempt_is_uploaded_by_a_sync_and_the_next_one_goes_on_in_the_same_history(
    server: Server, small_corpus: Path, tmp_path: Path
) -> None:
    arguments = tracked(small_corpus, tmp_path, server.uri)
    training = start("train", *arguments)
    wait_until(lambda: any(line["kind"] == "checkpoint_committed" for line in _lines(tmp_path / "run")))
    training.send_signal(signal.SIGKILL)
    training.communicate()
    synced = megamask("sync", tmp_path / "run", "--json")
    assert synced.code == 0, synced.stderr
    assert_whole(server.uri, tmp_path / "run", "FAILED")
    done = megamask("train", *arguments)
    assert done.code == 0, done.stderr
    assert_whole(server.uri, tmp_path / "run", "FINISHED")
    assert stored_run(server.uri, tmp_path / "run").data.tags["attempts"] == "2"


def _lines(run_dir: Path) -> list[dict[str, object]]:
    try:
        return journal(run_dir)
    except ValueError:  # the last line is being written
        return []


def _kill_and_restart(server: Server, _: Proxy) -> None:
    server.kill()
    server.start()


def _fail_for_a_while(_: Server, proxy: Proxy) -> None:
    proxy.is_failing = True
    proxy.released.wait(5)
    proxy.is_failing = False


def _be_slow(_: Server, proxy: Proxy) -> None:
    proxy.delay_s = 7.0


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("trouble", [_kill_and_restart, _fail_for_a_while, _be_slow])
def test_training_ends_well_whatever_the_server_does(
    server: Server, small_corpus: Path, tmp_path: Path, trouble: Callable[[Server, Proxy], None]
) -> None:
    proxy = Proxy(server.port)
    arguments = tracked(small_corpus, tmp_path, proxy.uri, "tracking.mlflow.drain_timeout_s=2", "training.steps=200")
    training = start("train", *arguments)
    try:
        wait_until(lambda: any(line["kind"] == "step" for line in _lines(tmp_path / "run")))
        troubling = threading.Thread(target=trouble, args=(server, proxy))
        troubling.start()
        _, errors = training.communicate(timeout=240)
        troubling.join()
        assert training.returncode == 0, errors
        proxy.delay_s = 0.0
        synced = megamask("sync", tmp_path / "run", "--json")
        assert synced.code == 0, synced.stderr
    finally:
        training.kill()
        proxy.close()
    assert_whole(server.uri, tmp_path / "run", "FINISHED")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_trainings_at_once_share_a_server(server: Server, small_corpus: Path, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    trainings = [start("train", *tracked(small_corpus, folder, server.uri)) for folder in folders]
    for training in trainings:
        _, errors = training.communicate(timeout=240)
        assert training.returncode == 0, errors
    for folder in folders:
        assert_whole(server.uri, folder / "run", "FINISHED")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_database_of_a_server_that_was_restored_from_a_backup_is_completed(
    server: Server, small_corpus: Path, tmp_path: Path
) -> None:
    """Half of the points are gone, and the state records that all were sent."""
    done = megamask("train", *tracked(small_corpus, tmp_path, server.uri))
    assert done.code == 0, done.stderr
    run = stored_run(server.uri, tmp_path / "run")
    server.kill()
    with sqlite3.connect(server.database) as database:
        database.execute("DELETE FROM metrics WHERE run_uuid = ? AND step > 20", (run.info.run_id,))
    server.start()
    assert megamask("sync", tmp_path / "run").code == 0
    assert_whole(server.uri, tmp_path / "run", "FINISHED")
