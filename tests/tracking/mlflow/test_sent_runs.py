"""Content of the store after runs were sent to it, again and again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megamask.runs.layout import mlflow_state_path
from megamask.tracking.journal.writer import Journal
from support.mlflow_runs import client, history, make_run, send, stored_run, write_attempt

pytestmark = pytest.mark.usefixtures("quick_sink")


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
