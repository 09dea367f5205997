"""Damage in the directory of a training run: it goes on from what is intact, and reports it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megamask.tracking.journal.chain import verify_chain
from support.command import checkpoints, journal, megamask, step_lines, tiny
from support.records import flip_byte

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, small_corpus: Path) -> Path:
    """A run of four steps with a commit each; read-only for tests."""
    runs = tmp_path_factory.mktemp("damage_runs")
    done = megamask("train", *arguments(small_corpus, runs), "training.steps=4", "--json")
    assert done.code == 0, done.stderr
    return runs / "run"


def arguments(corpus: Path, runs: Path) -> list[str]:
    return tiny(corpus, runs, "run", "checkpoint.every_steps=1", "checkpoint.keep_last=4", "optimizer.warmup_steps=2")


@pytest.mark.promise("a run resumes from the last intact commit, for any other damage to it")
def test_run_resumes_from_the_last_whole_commit_whatever_else_of_it_is_damaged(
    trained: Path, small_corpus: Path, tmp_path: Path
) -> None:
    """One commit of each kind of damage, every hint unreadable, and a journal with a changed line."""
    run_dir = Path(shutil.copytree(trained, tmp_path / "run"))
    first, second, third, fourth = checkpoints(run_dir)
    flip_byte(fourth / "COMMIT.json", 20)
    (third / "state.json").unlink()
    flip_byte(max(second.glob("*.safetensors"), key=lambda path: path.stat().st_size), -1)
    (run_dir / "checkpoints" / "latest").write_bytes(b"\xff nowhere")
    (run_dir / "status.json").write_bytes(b"{")
    (run_dir / "attempts" / "0001" / "claim.json").write_bytes(b"")
    (run_dir / "config" / "attempt-0001.yaml").write_bytes(b"[")
    file = run_dir / "journal" / "attempt-0001-000.jsonl"
    lines = file.read_bytes().split(b"\n")
    lines[3] = lines[3].replace(b'"step":1', b'"step":7', 1)
    file.write_bytes(b"\n".join(lines))

    done = megamask("train", *arguments(small_corpus, tmp_path), "training.steps=5", "--json")
    assert (done.code, done.json["step"]) == (0, 5), done.stderr

    later = [record for record in journal(run_dir) if record["kind"] in ("attempt_started", "incident")][1:]
    assert [record.get("incident") for record in later] == ["journal_damaged", None, *["checkpoint_damaged"] * 3]
    assert later[0]["damaged"][0]["file"] == file.name
    assert later[1]["resumed_from"]["checkpoint"] == first.name
    assert [record["checkpoint"] for record in later[2:]] == [fourth.name, third.name, second.name]
    assert [finding.file for finding in verify_chain(run_dir)] == [file.name]  # for ever, in that file alone
    repeated = {step: line for step, line in step_lines(run_dir).items() if 2 <= step <= 4}
    assert repeated == {step: line for step, line in step_lines(trained).items() if step >= 2}
    assert megamask("verify", "checkpoint", run_dir, "--json").json["step"] == 5
