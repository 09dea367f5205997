from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megamask.resilience.claims import claim
from megamask.resilience.status import Status, write_status
from megamask.tracking.journal import Journal
from megamask_pipelines.cli.main import main

RUN_JSON = {
    "format": "megamask-run",
    "version": 1,
    "run_id": "ab" * 16,
    "created": "2026-01-01T00:00:00Z",
    "identity": {"run.seed": 1},
    "extendable": {"training.steps": 20, "data.corpora": ["main"]},
    "corpora": {"main": "cd" * 32},
    "tokenizer_digest": "ef" * 32,
    "code_version": "0",
    "laws": {},
    "parent_checkpoint": None,
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(RUN_JSON))
    return folder


def train_a_little(run_dir: Path, *, steps: int) -> None:
    journal = Journal.open(run_dir, claim(run_dir))
    for step in range(1, steps + 1):
        journal.append("step", step=step, loss=5.0 - step / 10)
    journal.append("evaluation", step=steps, nelbo_nats_per_token=4.5)
    journal.close()


def commit(run_dir: Path, name: str, *, is_visible: bool = True) -> None:
    folder = run_dir / "checkpoints" / name
    folder.mkdir(parents=True)
    if is_visible:
        (folder / "COMMIT.json").write_text("{}")


def status(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> dict:
    assert main(["status", str(run_dir), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_fresh_run_has_done_nothing(run_dir, capsys):
    answer = status(run_dir, capsys)
    assert (answer["run_id"], answer["steps"], answer["num_attempts"]) == ("ab" * 16, 20, 0)
    for unknown in ("phase", "step", "loss", "last_checkpoint", "attempt", "reason"):
        assert answer[unknown] is None


def test_run_tells_step_loss_commit_and_attempts(run_dir, capsys):
    train_a_little(run_dir, steps=7)
    commit(run_dir, "step-00000004-a0001")
    commit(run_dir, "step-00000006-a0001")
    commit(run_dir, "step-00000007-a0001", is_visible=False)
    write_status(run_dir, Status(attempt=1, phase="preempted", exit_code=75, step=7, node="n1", reason="SIGTERM"))
    answer = status(run_dir, capsys)
    assert (answer["step"], answer["loss"]) == (7, 4.3)
    assert (answer["last_checkpoint"], answer["num_checkpoints"]) == ("step-00000006-a0001", 2)
    assert (answer["attempt"], answer["num_attempts"], answer["attempt_exit_code"]) == (1, 1, 75)
    assert main(["status", str(run_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 10
    text = "\n".join(lines)
    for part in ("preempted (exit code 75)", "7 of 20", "4.3000 nats", "step-00000006-a0001", "SIGTERM", "n1"):
        assert part in text


def test_exit_code_of_a_failed_run_is_not_the_verbs(run_dir):
    write_status(run_dir, Status(attempt=1, phase="failed", exit_code=66, step=3))
    assert main(["status", str(run_dir)]) == 0


def test_running_without_a_process_is_called_a_crash(run_dir, capsys):
    train_a_little(run_dir, steps=1)
    write_status(run_dir, Status(attempt=1, phase="running", step=1))
    assert status(run_dir, capsys)["is_live"]  # this very process holds the claim
    claim_file = run_dir / "attempts" / "0001" / "claim.json"
    claim_file.write_text(claim_file.read_text().replace(f'"pid": {os.getpid()}', '"pid": 999999999'))
    assert not status(run_dir, capsys)["is_live"]
    assert main(["status", str(run_dir)]) == 0
    assert "it crashed, or runs elsewhere" in capsys.readouterr().out


def test_step_is_found_behind_a_long_tail_and_a_torn_line(run_dir, capsys):
    journal = Journal.open(run_dir, claim(run_dir))
    journal.append("step", step=3, loss="nan")
    for number in range(40):
        journal.append("incident", incident="noise", text="x" * 10_000, number=number)
    journal.close()
    path = next((run_dir / "journal").iterdir())
    path.write_bytes(path.read_bytes() + b'{"seq": 42, "kind": "st')
    assert (status(run_dir, capsys)["step"], status(run_dir, capsys)["loss"]) == (3, "nan")
    assert main(["status", str(run_dir)]) == 0


def test_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert main(["status", str(tmp_path)]) == 2
    assert "is not a run directory" in capsys.readouterr().err
