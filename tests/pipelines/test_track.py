"""`megamask evaluate --track` and `megamask sample --track`: results on the run's page in MLflow."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from megamask.evaluation.request import EvaluationRequest
from megamask_pipelines.cli.main import main
from megamask_pipelines.track import evaluation_result
from support.command import checkpoints
from support.mlflow_server import client, stored_run

pytestmark = pytest.mark.multiprocess
PROMISE = pytest.mark.promise(
    "`megamask evaluate --track` and `sample --track` put their result on the run's page in MLflow"
)
EVALUATE = ("--rows", "1", "--draws", "1", "--replicates", "2", "--track")


@pytest.fixture(scope="module")
def synced(journalled_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the journalled run, beside the store that has it."""
    run_dir = Path(shutil.copytree(journalled_run, tmp_path_factory.mktemp("track") / "run"))
    for path in run_dir.glob("attempts/*/claim.json"):
        path.write_text(path.read_text().replace(f'"pid": {os.getpid()}', '"pid": 999999999'))
    assert main(["sync", str(run_dir)]) == 0
    return run_dir


def answer_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return answer


def artifacts(uri: str, run: Any, folder: str, where: Path) -> dict[str, dict[str, Any]]:
    store = client(uri)
    return {
        found.path: json.loads(Path(store.download_artifacts(run.info.run_id, found.path, str(where))).read_text())
        for found in store.list_artifacts(run.info.run_id, folder)
    }


@PROMISE
def test_evaluation_is_a_metric_at_its_step_and_an_artifact_once(
    synced: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"sqlite:///{synced.parent}/mlflow.db"
    answer = answer_of(capsys, "evaluate", synced, *EVALUATE)
    assert answer_of(capsys, "evaluate", checkpoints(synced)[-1], *EVALUATE) == answer  # the same once more
    run = stored_run(uri, synced)
    key = "evaluate/validation/bound_nats_per_token"
    [point] = client(uri).get_metric_history(run.info.run_id, key)
    assert (point.step, point.value) == (answer["step"], answer["nelbo_nats_per_token"])
    [(path, stored)] = artifacts(uri, run, "evaluations", tmp_path).items()
    assert path.startswith(f"evaluations/step-{answer['step']:08d}-")
    page = answer.pop("mlflow_page")
    assert (stored["result"], stored["request"]["draws"]) == (answer, 1)
    assert run.info.run_id in page


@PROMISE
def test_sample_is_an_artifact(synced: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"sqlite:///{synced.parent}/mlflow.db"
    answer = answer_of(capsys, "sample", synced, "--prompt", "alpha", "--length", "2", "--track")
    [stored] = artifacts(uri, stored_run(uri, synced), "samples", tmp_path).values()
    assert (stored["request"]["prompt"], stored["result"]["text"]) == ("alpha", answer["text"])


@PROMISE
def test_checkpoint_outside_of_a_run_and_a_run_that_mlflow_lacks_are_refused_before_measuring(
    synced: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(checkpoints(synced)[-1], tmp_path / "alone"))
    capsys.readouterr()
    assert main(["evaluate", str(copy), "--track"]) == 2
    assert "neither a run directory nor a checkpoint inside one" in capsys.readouterr().err
    run_dir = Path(shutil.copytree(synced, tmp_path / "run"))
    assert main(["evaluate", str(run_dir), "--track"]) == 2
    assert "megamask sync" in capsys.readouterr().err
    assert not (tmp_path / "mlflow.db").exists()


def test_bound_of_the_runs_own_split_names_its_dataset(synced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megamask.tracking.records import AttemptStarted
    from megamask_pipelines import track

    dataset = {"name": "main", "split": "validation", "corpus_id": "ab" * 32}
    monkeypatch.setattr(track, "newest_start", lambda run_dir, before: AttemptStarted(attempt=1, datasets=[dataset]))
    answer = {"nelbo_nats_per_token": 2.0, "standard_error": 0.1, "bits_per_byte": None, "step": 3}
    result = evaluation_result(synced, EvaluationRequest(), answer)
    assert result.dataset == ("main/validation", ("ab" * 32)[:36])
    assert result.metrics == {
        "evaluate/validation/bound_nats_per_token": 2.0,
        "evaluate/validation/standard_error_nats_per_token": 0.1,
    }
    assert evaluation_result(synced, EvaluationRequest(corpus=Path("elsewhere")), answer).dataset is None
    assert evaluation_result(synced, EvaluationRequest(texts=[Path("a.txt")]), answer).dataset is None
