"""A run directory and its corpus as the release before this one wrote them: two attempts, six steps, one checkpoint.

tests/golden/run_of_0.1.0.tgz was made with version 0.1.0: `megamask prepare`, then `megamask train` twice (the first
attempt with training.stop_after_step=3), on a network of one layer.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megamask_pipelines.cli.main import main
from support.stored_run import RUN_ID, unpack


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that `run` and `corpus` were unpacked to; the working folder, as the config's paths are relative."""
    unpack(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    capsys.readouterr()
    code = main([*arguments, "--json"])
    written = capsys.readouterr()
    assert code == 0, written
    found: dict[str, object] = json.loads(written.out.splitlines()[-1])
    return found


def test_stored_run_is_read_by_status(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "status", "run")
    assert (found["run_id"], found["phase"], found["step"], found["steps"]) == (RUN_ID, "done", 6, 6)
    attempts = found["attempts"]
    assert isinstance(attempts, list)
    assert [(each["first_step"], each["last_step"], each["outcome"]) for each in attempts] == [
        (1, 3, "stopped"),
        (4, 6, "done"),
    ]


@pytest.mark.parametrize("step", [1, 6])
def test_stored_run_is_read_by_inspect(stored: Path, capsys: pytest.CaptureFixture[str], step: int) -> None:
    found = answer(capsys, "inspect", "run", "--step", str(step))
    assert found["matches_journal"] is True


def test_stored_run_is_read_by_verify_run(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "verify", "run", "run", "--corpus", "main=corpus", "--data")
    assert found["checked"] == {
        "journal_lines": 19,
        "steps": 6,
        "repeated_steps": 0,
        "attempts": 2,
        "checkpoints": 1,
        "checkpoint_bytes": 217096,
        "corpora": 1,
    }


def test_stored_run_is_read_by_sync(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "sync", "run", "--uri", f"sqlite:///{stored}/mlflow.db")
    assert (found["steps"], found["checkpoints"], found["status"]) == (6, 2, "FINISHED")
