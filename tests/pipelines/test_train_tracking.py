"""Evidence for an auditor after training: the loss curve and commits in MLflow, and samples that can be recomputed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from support.command import checkpoints, journal, megamask, tiny

pytestmark = pytest.mark.multiprocess

STEPS = ("training.steps=6", "optimizer.warmup_steps=3")


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, small_corpus: Path) -> Path:
    """A run of 6 steps in two attempts, tracked in the default store."""
    runs = tmp_path_factory.mktemp("tracked")
    arguments = tiny(small_corpus, runs, "tracked", *STEPS, "tracking.mlflow.enabled=true")
    arguments += ["evaluation.every_steps=3", "evaluation.rows=2"]
    first = megamask("train", *arguments, "training.stop_after_step=4")
    assert first.code == 0, first.stderr
    second = megamask("train", *arguments)
    assert second.code == 0, second.stderr
    return runs / "tracked"


def test_both_attempts_are_one_finished_mlflow_run_with_the_whole_loss_curve(
    tracked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tracked.parent)
    client = MlflowClient(tracking_uri=f"sqlite:///{tracked.parent}/mlflow.db")
    [experiment] = [found for found in client.search_experiments() if found.name == "megamask"]
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.start_time <= run.info.end_time
    losses = {point.step: point.value for point in client.get_metric_history(run.info.run_id, "loss_nats_per_token")}
    steps = {record["step"]: record["loss"] for record in journal(tracked) if record["kind"] == "step"}
    assert losses == pytest.approx(steps)
    record = json.loads((tracked / "run.json").read_text())
    assert run.data.tags["megamask.run_id"] == record["run_id"]
    assert record["corpora"]["main"] in run.data.tags.values()
    assert run.data.params["training.global_batch_size"] == "8"
    committed = [r for r in journal(tracked) if r["kind"] == "checkpoint_committed"]
    assert committed[-1]["digest"] in run.data.tags.values()
    assert [file.path for file in client.list_artifacts(run.info.run_id, "config")] == [
        "config/attempt-0001.yaml",
        "config/attempt-0002.yaml",
    ]


@pytest.mark.promise("commits and datasets are browsable in MLflow, and a pruned commit remains")
def test_commits_and_datasets_are_browsable_in_mlflow(tracked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tracked.parent)
    client = MlflowClient(tracking_uri=f"sqlite:///{tracked.parent}/mlflow.db")
    [experiment] = [found for found in client.search_experiments() if found.name == "megamask"]
    models = client.search_logged_models([experiment.experiment_id])
    committed = {r["checkpoint"]: r for r in journal(tracked) if r["kind"] == "checkpoint_committed"}
    assert {model.tags["checkpoint"]: model.params["digest"] for model in models} == {
        name: record["digest"] for name, record in committed.items()
    }
    [run] = client.search_runs([experiment.experiment_id])
    assert {output.model_id for output in run.outputs.model_outputs} == {model.model_id for model in models}
    record = json.loads((tracked / "run.json").read_text())
    datasets = {found.dataset.name: found for found in run.inputs.dataset_inputs}
    assert datasets.keys() == {"main/train", "main/validation"}
    profile = json.loads(datasets["main/validation"].dataset.profile)
    assert profile["corpus_id"] == record["corpora"]["main"]
    assert profile["sequence_length"] == 64


def test_evaluation_during_training_equals_the_verb_on_the_reference_network(tracked: Path) -> None:
    inside = [record for record in journal(tracked) if record["kind"] == "evaluation"][-1]
    assert inside["step"] == 6
    done = megamask("evaluate", tracked, "--split", "validation", "--rows", "2", "--json")
    assert done.code == 0, done.stderr
    for key in ("num_tokens", "num_bytes", "num_samples"):
        assert done.json[key] == inside[key]
    for key in ("nelbo_nats_per_token", "standard_error", "bits_per_byte"):
        assert done.json[key] == pytest.approx(inside[key], rel=1e-5), key


def test_inspection_recomputes_what_was_trained_on(tracked: Path) -> None:
    done = megamask("inspect", tracked, "--step", "5", "--json")
    assert done.code == 0, done.stderr
    assert done.json["matches_journal"] is True
    [line] = [record for record in journal(tracked) if record["kind"] == "step" and record["step"] == 5]
    samples = done.json["samples"]
    assert [sample["sample_index"] for sample in samples] == list(range(32, 40))
    assert sum(len(sample["masked"]) for sample in samples) == line["masked_tokens"]


@pytest.mark.promise("a trained run is consistent with itself")
def test_run_directory_agrees_with_itself_after_two_attempts(tracked: Path) -> None:
    done = megamask("verify", "run", tracked, "--json")
    assert done.code == 0, done.stdout
    assert done.json["checked"] | {"checkpoint_bytes": 0, "journal_lines": 0} == {
        "journal_lines": 0,
        "steps": 6,
        "repeated_steps": 0,
        "attempts": 2,
        "checkpoints": 2,
        "checkpoint_bytes": 0,
        "corpora": 1,
    }
    assert done.json["findings"] == done.json["notes"] == []


def test_run_continues_when_its_corpus_has_moved(tracked: Path, small_corpus: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(tracked, tmp_path / "tracked"))
    moved = Path(shutil.copytree(small_corpus, tmp_path / "elsewhere"))
    done = megamask("train", *tiny(moved, tmp_path, "tracked", *STEPS, "training.steps=7"), "--json")
    assert (done.code, done.json["step"]) == (0, 7), done.stderr
    assert len(checkpoints(run_dir)) == 2


def test_copied_checkpoint_is_complete_by_itself(tracked: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints(tracked)[-1], tmp_path / "checkpoint"))
    (tmp_path / "text.txt").write_text("def f(x):\n    return x + 1\n" * 20)
    done = megamask("evaluate", folder, "--text", tmp_path / "text.txt", "--json")
    assert done.code == 0, done.stderr
    assert done.json["num_bytes"] == 27 * 20
    assert megamask("verify", "checkpoint", folder).code == 0
    done = megamask("sample", folder, "--prompt", "def ", "--length", "4", "--steps", "2", "--json")
    assert done.code == 0, done.stderr
    assert done.json["text"].startswith("def ")
