from __future__ import annotations

import json
import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from megamask.audit.state_text import duration
from megamask.runs.claims import claim
from megamask.runs.rank_files import write_rank_failure
from megamask.runs.status import Status, write_status
from megamask.tracking.journal import lines as journal_lines
from megamask.tracking.journal.writer import Journal
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
    assert "it crashed: the process that held it on this host is gone" in capsys.readouterr().out


@pytest.mark.promise("`megamask status` on another host names the node, the job and when the run was last heard")
@pytest.mark.parametrize(
    ("age_s", "ending"),
    [(4, "ago"), (7200, "ago: it crashed, hangs, or makes a long pause")],
)
def test_run_on_another_node_is_shown_with_its_job_and_when_it_was_heard(run_dir, capsys, monkeypatch, age_s, ending):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("NODE_NAME", "gpu-7")
    number = claim(run_dir)
    monkeypatch.delenv("NODE_NAME")
    claim_file = run_dir / "attempts" / "0001" / "claim.json"
    document = json.loads(claim_file.read_text())
    claim_file.write_text(json.dumps({**document, "host": "gpu-7", "boot_id": "another"}))
    heard = (datetime.now(UTC) - timedelta(seconds=age_s)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    write_status(run_dir, Status(attempt=number, phase="running", step=1, time=heard))
    found = status(run_dir, capsys)
    assert (found["is_live"], found["has_died"], found["scheduler_id"]) == (False, False, "SLURM_JOB_ID=12")
    assert age_s <= found["heard_age_s"] < age_s + 300
    assert main(["status", str(run_dir)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("phase"))
    assert "running on gpu-7 (SLURM_JOB_ID=12), last heard" in line
    assert line.endswith(ending)


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


# Attempt by attempt.


def end_claims(run_dir: Path) -> None:
    """No living process holds the run any more."""
    for path in run_dir.glob("attempts/*/claim.json"):
        path.write_text(path.read_text().replace(f'"pid": {os.getpid()}', '"pid": 999999999'))


def text_of(run_dir, capsys) -> list[str]:
    assert main(["status", str(run_dir)]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def two_attempts(journalled_run, tmp_path):
    copy = Path(shutil.copytree(journalled_run, tmp_path / "run"))
    end_claims(copy)
    return copy


@pytest.mark.promise("`megamask status` describes a run attempt by attempt in about ten lines, many attempts folded")
def test_run_of_two_attempts_is_shown_in_ten_lines(two_attempts, capsys):
    lines = text_of(two_attempts, capsys)
    assert len(lines) <= 10
    text = "\n".join(lines)
    for part in (
        "phase      done (exit code 0): all steps are done",
        "step       6 of 6 (100.0 %)",
        "loss       4.4000 nats per token; bound 4.4000 ± 0.1000 on held-out text at step 6",
        "commits    step-00000006-a0002; before it step 4",
        "mlflow_outage: MLflow takes nothing",
        "steps 1-5  crashed without a word",
        "committed step 4",
        "steps 5-6  done (0)",
        "committed step 6",
    ):
        assert part in text, text


def test_answer_has_everything_of_each_attempt(two_attempts, capsys):
    answer = status(two_attempts, capsys)
    first, second = answer["attempts"]
    kept = ("number", "resumed_from", "first_step", "last_step", "committed_step", "outcome", "exit_code", "ranks")
    assert {name: first[name] for name in kept} == {
        "number": 1,
        "resumed_from": None,
        "first_step": 1,
        "last_step": 5,
        "committed_step": 4,
        "outcome": "crashed",
        "exit_code": None,
        "ranks": [],
    }
    assert (second["resumed_from"], second["outcome"], second["exit_code"]) == (4, "done", 0)
    assert second["seconds"] >= 0
    assert (answer["num_incidents"], answer["are_all_incidents"]) == (1, True)
    assert answer["last_incident"]["incident"] == "mlflow_outage"
    assert answer["evaluation"]["nelbo_nats_per_token"] == 4.4
    assert answer["checkpoints"] == ["step-00000006-a0002", "step-00000004-a0001"]


def test_attempt_that_only_its_ranks_speak_of_is_explained_by_them(two_attempts, capsys):
    write_rank_failure(two_attempts, 1, rank=3, exit_code=74, reason="the disk is full")
    write_rank_failure(two_attempts, 1, rank=1, exit_code=1, reason="lost its peer")
    first = status(two_attempts, capsys)["attempts"][0]
    assert (first["outcome"], first["exit_code"], first["reason"]) == ("failed", 74, "lost its peer")
    assert [rank["rank"] for rank in first["ranks"]] == [1, 3]
    assert any("failed (74)" in line and "lost its peer" in line for line in text_of(two_attempts, capsys))


@pytest.mark.promise("a superseded attempt is reported as superseded, and by which")
def test_superseded_attempt_is_called_superseded_and_by_which(two_attempts, capsys):
    write_rank_failure(two_attempts, 1, rank=0, exit_code=93, reason="superseded by attempt 2")
    write_rank_failure(two_attempts, 1, rank=1, exit_code=1, reason="lost the connection to another rank")
    first, second = status(two_attempts, capsys)["attempts"]
    assert (first["outcome"], first["exit_code"], first["superseded_by"]) == ("superseded", 93, 2)
    assert first["reason"] == "superseded by attempt 2"
    assert second["superseded_by"] is None
    assert any("steps 1-5  superseded by attempt 2 (93)" in line for line in text_of(two_attempts, capsys))


def test_attempt_whose_launcher_wrote_the_status_is_explained_by_it(run_dir, capsys):
    train_a_little(run_dir, steps=3)
    write_status(run_dir, Status(attempt=1, phase="failed", exit_code=1, step=3, reason="rank 1 was killed by SIGKILL"))
    end_claims(run_dir)
    [attempt] = status(run_dir, capsys)["attempts"]
    assert (attempt["outcome"], attempt["exit_code"], attempt["last_step"]) == ("failed", 1, 3)
    assert any("killed by SIGKILL" in line for line in text_of(run_dir, capsys) if line.startswith("attempt"))


@pytest.mark.promise("`megamask status` describes a run attempt by attempt in about ten lines, many attempts folded")
def test_many_attempts_are_folded_and_counted(run_dir, capsys):
    step = 0
    for number in range(1, 61):
        end_claims(run_dir)
        journal = Journal.open(run_dir, claim(run_dir))
        journal.append("attempt_started", attempt=number, resumed_from=None if step == 0 else {"step": step})
        for _ in range(2):
            step += 1
            journal.append("step", step=step, loss=1.0)
        if number % 5:
            code = 75 if number % 2 else 74
            phase = "preempted" if code == 75 else "failed"
            journal.append("attempt_ended", attempt=number, phase=phase, exit_code=code, step=step, reason="so")
        journal.close()
    end_claims(run_dir)
    lines = text_of(run_dir, capsys)
    assert len(lines) <= 11
    [folded] = [line for line in lines if line.startswith("attempts ")]
    middle = "2-58: 24 failed (74), 22 preempted (75), 11 crashed without a word"
    assert folded.removeprefix("attempts ").strip() == middle
    shown = [line.split()[1] for line in lines if line.startswith("attempt ")]
    assert shown == ["1", "59", "60"]
    answer = status(run_dir, capsys)
    assert len(answer["attempts"]) == 60
    assert [attempt["resumed_from"] for attempt in answer["attempts"][:3]] == [None, 2, 4]


@pytest.mark.promise("`megamask status` reads only the ends of a long journal")
def test_long_journal_is_read_at_its_ends_only(run_dir, capsys, monkeypatch):
    """Not a time: the lines that were looked at are counted."""
    journal = Journal.open(run_dir, claim(run_dir), rotate_bytes=2**20)
    journal.close()
    path = next((run_dir / "journal").iterdir())
    start = datetime(2026, 1, 1, tzinfo=UTC)
    num_steps = 30_000
    with path.open("w") as file:
        file.write(line_of(0, "attempt_started", start, attempt=1, resumed_from=None))
        for step in range(1, num_steps + 1):
            file.write(line_of(step, "step", start + timedelta(seconds=2 * step), step=step, loss=1.5, pad="x" * 500))
    looked_at = 0
    parse = journal_lines.parse

    def counted(data):
        nonlocal looked_at
        looked_at += 1
        return parse(data)

    monkeypatch.setattr(journal_lines, "parse", counted)
    answer = status(run_dir, capsys)
    assert 0 < looked_at < 500
    [attempt] = answer["attempts"]
    assert (attempt["first_step"], attempt["last_step"], answer["step"]) == (1, num_steps, num_steps)
    assert answer["are_all_incidents"] is False
    assert attempt["outcome"] == "running"


def line_of(seq: int, kind: str, time: datetime, **fields: object) -> str:
    record = {"seq": seq, "time": time.isoformat().replace("+00:00", "Z"), "kind": kind, "prev": "0" * 64, **fields}
    return json.dumps(record) + "\n"


def test_live_run_tells_the_time_to_go_by_the_pace_of_its_last_steps(run_dir, capsys):
    Journal.open(run_dir, claim(run_dir)).close()
    path = next((run_dir / "journal").iterdir())
    start = datetime.now(UTC) - timedelta(seconds=40)
    times = [start + timedelta(seconds=10 * step) for step in range(4)]
    times[1] = start - timedelta(days=400)  # a clock that jumped
    path.write_text("".join(line_of(n, "step", time, step=n + 1, loss=1.0) for n, time in enumerate(times)))
    answer = status(run_dir, capsys)
    assert answer["eta_s"] == pytest.approx(10 * (20 - 4))
    assert answer["last_line_age_s"] == pytest.approx(10, abs=60)
    assert any("4 of 20 (20.0 %), 3 min to go" in line for line in text_of(run_dir, capsys))
    end_claims(run_dir)
    assert status(run_dir, capsys)["eta_s"] is None


@pytest.mark.parametrize(
    "line",
    [
        '{"seq":1,"time":"yesterday","kind":"step","prev":"0","step":"many"}',
        '{"seq":1,"time":"","kind":"attempt_ended","prev":"0"}',
        '{"seq":1,"time":"x","kind":"attempt_started","prev":"0","resumed_from":7}',
        '{"seq":1,"time":"x","kind":"incident","prev":"0"}',
        '{"seq":1,"time":"x","kind":"checkpoint_committed","prev":"0","step":null}',
        '{"seq":1,"time":"x","kind":"evaluation","prev":"0"}',
        "[" * 100_000,
        "\x00" * 5000,
    ],
)
def test_strange_lines_stop_nobody(run_dir, capsys, line):
    Journal.open(run_dir, claim(run_dir)).close()
    next((run_dir / "journal").iterdir()).write_text(line + "\n")
    status(run_dir, capsys)
    assert len(text_of(run_dir, capsys)) <= 10


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (119, "119 s"), (180, "3 min"), (7200, "2 h"), (7500, "2 h 5 min"), (180_000, "2 d 2 h")],
)
def test_duration_is_written_in_the_units_that_matter(seconds, words):
    assert duration(seconds) == words


def test_goodput_accounts_for_each_attempt(two_attempts, capsys):
    assert main(["status", str(two_attempts), "--goodput", "--json"]) == 0
    account = json.loads(capsys.readouterr().out)["goodput"]
    assert [row["attempt"] for row in account["attempts"]] == [1, 2]
    assert [(row["first_step"], row["last_step"]) for row in account["attempts"]] == [(1, 5), (5, 6)]
    assert main(["status", str(two_attempts), "--goodput"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("goodput") and "lost" in text and "attempt 2" in text


def test_goodput_takes_one_run(two_attempts, capsys):
    assert main(["status", str(two_attempts.parent), "--goodput"]) == 2
    assert "--goodput takes one run" in capsys.readouterr().err


def test_slow_rank_is_shown_once_with_what_was_measured_last(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal.open(run_dir, claim(run_dir))
    for step, seconds in ((300, 1.25), (600, 1.5)):
        fields = {"rank": 3, "node": "gpu-7", "section": "passes", "median_s": 1.0}
        journal.append("straggler", step=step, seconds_per_step=seconds, **fields)
    journal.close()
    found = status(run_dir, capsys)["stragglers"]
    assert [(line["rank"], line["step"]) for line in found] == [(3, 300), (3, 600)]
    assert main(["status", str(run_dir)]) == 0
    text = capsys.readouterr().out
    assert text.count("rank 3 on gpu-7 (passes, 1.5 s a step, median 1 s, at step 600)") == text.count("gpu-7") == 1
