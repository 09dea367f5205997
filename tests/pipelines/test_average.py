"""`megamask average`: the best checkpoints of a run, merged."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megamask.checkpoint.commit import load_commit
from megamask.checkpoint.origin import read_origin
from megamask.checkpoint.reader import candidates, verify_checkpoint
from megamask.checkpoint.standalone import load_checkpoint
from megamask.checkpoint.state_files import check_state
from megamask.conversion.averaging import average, best_commits
from megamask.engine.state.restore import canonical_reader
from megamask.errors import UsageError
from megamask_pipelines.average import average_best
from megamask_pipelines.cli import average as cli
from megamask_pipelines.evaluate import EvaluationRequest, evaluate
from support.tiny_run import write_corpus, write_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("average")
    return write_run(folder, write_corpus(folder), earlier_steps=(5, 10, 15))[0]


def test_the_lowest_bounds_are_chosen_and_ordered_by_step(run_dir: Path) -> None:
    bounds = {5: 3.0, 10: 1.0, 15: None, 20: 2.0}
    commits = [load_commit(folder) for folder in candidates(run_dir)]
    measured = [
        replace(
            commit, evaluation=None if (bound := bounds[commit.step]) is None else {"nelbo_nats_per_token": str(bound)}
        )
        for commit in commits
    ]
    assert [commit.step for commit in best_commits(measured, 2)] == [10, 20]
    assert [commit.step for commit in best_commits(measured, 3)] == [5, 10, 20]
    with pytest.raises(UsageError, match="3 of 4 checkpoints have a bound"):
        best_commits(measured, 4)
    last_phase = [
        replace(commit, evaluation={**commit.evaluation, "bound_from_step": "8.0"})
        if commit.evaluation and commit.step > 7
        else commit
        for commit in measured
    ]
    assert [commit.step for commit in best_commits(last_phase, 2)] == [10, 20]
    with pytest.raises(UsageError, match="2 of 4 checkpoints have a bound of their own step in the objective's last"):
        best_commits(last_phase, 3)


@pytest.mark.promise("average makes a checkpoint of the mean weights that evaluate and sample take")
def test_the_mean_is_a_checkpoint(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = [load_commit(folder) for folder in candidates(run_dir)][:2]
    spec = load_checkpoint(run_dir).model.spec
    name = "model.layers.0.mlp.up_proj.weight"
    weight = canonical_reader(commits[0].folder, spec)(name)

    def doubled(folder: Path, spec: object) -> object:
        read = canonical_reader(folder, spec)  # type: ignore[arg-type]
        return (lambda tensor: 2 * read(tensor)) if folder == commits[1].folder else read

    monkeypatch.setattr("megamask.conversion.averaging.canonical_reader", doubled)
    average(tmp_path / "mean", commits)
    assert torch.equal(canonical_reader(tmp_path / "mean", spec)(name), (1.5 * weight.double()).float())
    assert verify_checkpoint(tmp_path / "mean", check_state)["ok"]
    origin = read_origin(load_commit(tmp_path / "mean"))
    assert origin is not None
    assert [entry["digest"] for entry in origin.checkpoints] == [commit.digest for commit in commits]
    report = evaluate(
        tmp_path / "mean", EvaluationRequest(texts=[run_dir.parent / "texts" / "00.txt"], draws=1, replicates=4)
    )
    assert report["num_tokens"] > 0


def test_a_run_without_bounds_is_refused(run_dir: Path, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    with pytest.raises(UsageError, match="0 of 4 checkpoints have a bound"):
        cli.run(parser.parse_args([str(run_dir), str(tmp_path / "mean")]))
    with pytest.raises(UsageError, match="--best is 0"):
        average_best(run_dir, tmp_path / "mean", count=0)
    assert list(tmp_path.iterdir()) == []
