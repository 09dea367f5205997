"""verify run: a run whose records agree passes; any change in it is found, with its file and line."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from megamask_pipelines.cli.main import main
from support.journal_edits import NEWEST, Verify, found, lines_of, place, rewrite
from support.journalled_run import write_journalled_run
from support.shards import flip_bit
from support.tiny_run import write_corpus


@pytest.mark.promise("`megamask verify run` accepts a consistent run, and names file and line of every contradiction")
def test_whole_run_passes_and_is_counted(verify: Verify) -> None:
    answer = verify(0)
    assert answer["checked"] | {"checkpoint_bytes": 0} == {
        "journal_lines": 21,
        "steps": 7,
        "repeated_steps": 1,
        "attempts": 2,
        "checkpoints": 2,
        "checkpoint_bytes": 0,
        "corpora": 1,
    }
    assert answer["checked"]["checkpoint_bytes"] > 10_000
    assert answer["notes"] == ["attempt 1 ended without a last line after step 5"]
    assert answer["is_live"] is False


def test_run_whose_journal_is_chained_anew_unchanged_passes(run_dir: Path, verify: Verify) -> None:
    """The forgeries below are found by what they change; alone it gives the same bytes."""
    rewrite(run_dir, lambda attempt, lines: None)
    verify(0)


def test_journal_in_many_files_passes(journalled_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = journalled_run.parent / "data" / "corpus"
    (tmp_path / "x").mkdir()
    run_dir = write_journalled_run(tmp_path / "x", corpus, rotate_bytes=700)
    assert len(list((run_dir / "journal").iterdir())) > 8
    assert main(["verify", "run", str(run_dir)]) == 0
    assert "everything agrees. Checked: " in capsys.readouterr().out


STEP_CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "step": ({"step": 9}, "step 9 follows step 2"),
    "samples": ({"consumed_samples": 8}, "consumed_samples is 8; it must be"),
    "batch": ({"batch_digest": "0" * 16}, "batch_digest is '0000000000000000'"),
    "size": ({"global_batch_size": 9}, "global_batch_size is 9; it must be "),
    "tokens": ({"consumed_tokens": 10**9}, "consumed_tokens grew by"),
    "fewer tokens": ({"consumed_tokens": 1}, "consumed_tokens grew by -"),
    "views": ({"processed_tokens": 7}, "processed_tokens is 7"),
    "masks": ({"masked_tokens": 10**6}, "masked_tokens is 1000000, more than"),
    "levels": ({"masked_tokens_by_noise_level": [1] * 10}, "the sum of masked_tokens_by_noise_level is 10"),
    "loss": ({"loss": 4.0}, "loss is 4.0, its terms add up to 4.7"),
    "a word": ({"consumed_samples": "7"}, "consumed_samples is '7'"),
    "true": ({"step": True}, "lacks or misstates a field"),
    "nothing": ({"masked_tokens": None}, "lacks or misstates a field"),
}


@pytest.mark.promise("`megamask verify run` accepts a consistent run, and names file and line of every contradiction")
@pytest.mark.parametrize("name", STEP_CHANGES)
def test_step_that_breaks_the_order_law_is_found_at_its_line(run_dir: Path, verify: Verify, name: str) -> None:
    change, problem = STEP_CHANGES[name]

    def forge(attempt: int, lines: list[dict[str, Any]]) -> None:
        if attempt == 1:
            lines[place(lines, "step", 3)].update(change)

    line = place(lines_of(run_dir, 1), "step", 3) + 1
    rewrite(run_dir, forge)
    found(verify(65), problem, "journal/attempt-0001-000.jsonl", line)


@pytest.mark.parametrize("key", ["masked_tokens", "content_digest"])
def test_repeated_step_that_was_another_step_is_found(run_dir: Path, verify: Verify, key: str) -> None:
    def forge(attempt: int, lines: list[dict[str, Any]]) -> None:
        if attempt == 2:
            lines[place(lines, "step", 5)][key] = 1 if key == "masked_tokens" else "f" * 16

    rewrite(run_dir, forge)
    found(verify(65), "step 5 has other samples, tokens or masks than in attempt 1", "journal/attempt-0002-000.jsonl")


LINE_CHANGES: dict[str, tuple[int, str, dict[str, Any], str]] = {
    "run": (1, "run_started", {"run_id": "x"}, "run_id is 'x'"),
    "corpora": (1, "run_started", {"corpora": {}}, "corpora is {}"),
    "attempt": (2, "attempt_started", {"attempt": 7}, "attempt is 7; it must be 2"),
    "other run": (2, "attempt_started", {"run_id": "x"}, "run_id is 'x'"),
    "resumed step": (2, "attempt_started", {"resumed_from": None}, "step 5 follows step 0"),
    "committed step": (1, "checkpoint_committed", {"step": 3}, "names step 3; the last step is 2"),
    "committed name": (
        1,
        "checkpoint_committed",
        {"checkpoint": "step-00000009-a0001"},
        "checkpoint is 'step-00000009",
    ),
    "location": (2, "checkpoint_committed", {"location": "/tmp/x"}, "location is '/tmp/x'"),
    "parent": (2, "checkpoint_committed", {"parent": "0" * 64}, f"parent is '{'0' * 64}'; it must be"),
    "digest": (2, "checkpoint_committed", {"digest": "0" * 64}, "digest is '0000"),
    "bytes": (2, "checkpoint_committed", {"bytes": 1}, "bytes is 1"),
    "evaluation": (2, "evaluation", {"step": 7}, "a evaluation line names step 7"),
    "end": (2, "attempt_ended", {"step": 5}, "step is 5; it must be 6"),
    "end code": (2, "attempt_ended", {"exit_code": 75}, "exit_code is 0; attempt 2 ended as 75"),
    "end phase": (2, "attempt_ended", {"phase": "failed"}, "has not ended as done"),
    "completed": (2, "run_completed", {"consumed_tokens": 1}, "consumed_tokens is 1"),
    "completed step": (2, "run_completed", {"step": 5}, "step is 5; it must be 6"),
}


@pytest.mark.promise("`megamask verify run` accepts a consistent run, and names file and line of every contradiction")
@pytest.mark.parametrize("name", LINE_CHANGES)
def test_line_that_contradicts_the_others_is_found(run_dir: Path, verify: Verify, name: str) -> None:
    attempt, kind, change, problem = LINE_CHANGES[name]

    def forge(number: int, lines: list[dict[str, Any]]) -> None:
        if number == attempt:
            lines[place(lines, kind)].update(change)

    rewrite(run_dir, forge)
    found(verify(65), problem)


def test_line_that_was_taken_out_is_found_by_the_steps_and_by_the_commit(run_dir: Path, verify: Verify) -> None:
    def forge(attempt: int, lines: list[dict[str, Any]]) -> None:
        if attempt == 1:
            del lines[place(lines, "step", 3)]

    rewrite(run_dir, forge)
    answer = verify(65)
    found(answer, "step 4 follows step 2", "journal/attempt-0001-000.jsonl")
    found(answer, "is not in the journal", "checkpoints/step-00000004-a0001/COMMIT.json")


def test_line_after_the_end_of_an_attempt_is_found(run_dir: Path, verify: Verify) -> None:
    def forge(attempt: int, lines: list[dict[str, Any]]) -> None:
        if attempt == 2:
            lines.append(dict(lines[place(lines, "step", 6)]))

    rewrite(run_dir, forge)
    found(verify(65), "a step line follows the end of attempt 2")


@pytest.mark.promise("`megamask verify run` accepts a consistent run, and names file and line of every contradiction")
def test_every_flipped_byte_of_the_journal_is_found(run_dir: Path, verify: Verify, capsys: Any) -> None:
    """Any byte but the very last line's: nothing holds the hash of that one."""
    for path in sorted((run_dir / "journal").iterdir()):
        data = path.read_bytes()
        end = len(data) if path.name.startswith("attempt-0001") else data[:-1].rindex(b"\n")
        for offset in range(0, end, max(1, end // 25)):
            flip_bit(path, offset, offset % 7)
            assert main(["verify", "run", str(run_dir)]) == 65, (path.name, offset)
            path.write_bytes(data)
    capsys.readouterr()
    verify(0)


def test_torn_last_line_is_a_finding_unless_the_run_is_alive(run_dir: Path, verify: Verify) -> None:
    path = run_dir / "journal" / "attempt-0002-000.jsonl"
    path.write_bytes(path.read_bytes() + b'{"seq": 22, "kin')
    found(verify(65), "torn", "journal/attempt-0002-000.jsonl", 10)
    claim = run_dir / "attempts" / "0002" / "claim.json"
    claim.write_text(claim.read_text().replace('"pid": 999999999', f'"pid": {os.getpid()}'))
    answer = verify(0)
    assert answer["is_live"] is True
    assert "attempt-0002-000.jsonl, line 10 is being written" in answer["notes"]


def test_claim_that_is_lost_or_of_another_attempt_is_found(run_dir: Path, verify: Verify) -> None:
    path = run_dir / "attempts" / "0001" / "claim.json"
    path.write_text(path.read_text().replace('"attempt": 1', '"attempt": 2'))
    found(verify(65), "claim of another attempt", "attempts/0001/claim.json")
    path.unlink()
    found(verify(65), "it is missing", "attempts/0001/claim.json")


def test_config_that_is_lost_or_of_another_run_is_found(run_dir: Path, verify: Verify) -> None:
    path = run_dir / "config" / "attempt-0002.yaml"
    text = path.read_text()
    path.write_text(text.replace("hidden_size: 32", "hidden_size: 64"))
    found(verify(65), "model.hidden_size is 64, recorded 32", "config/attempt-0002.yaml")
    path.write_text("x: [")
    found(verify(65), "not valid YAML", "config/attempt-0002.yaml")
    path.unlink()
    found(verify(65), "though attempt 2 has a journal", "config/attempt-0002.yaml")


def test_attempt_between_others_that_left_nothing_is_found(run_dir: Path, verify: Verify) -> None:
    (run_dir / "attempts" / "0004").mkdir()
    shutil.copy(run_dir / "attempts" / "0002" / "claim.json", run_dir / "attempts" / "0004" / "claim.json")
    answer = verify(65)
    found(answer, "the attempts are 1, 2, 4")
    assert "attempt 4 ended before it wrote its config" in answer["notes"]


def test_corpus_that_is_another_ends_with_64_and_one_that_is_away_is_noted(
    run_dir: Path, verify: Verify, tmp_path: Path
) -> None:
    config = run_dir / "config" / "attempt-0002.yaml"
    text = config.read_text()
    other = write_corpus(tmp_path / "other", words=("one", "two"))
    original = next(line.split(": ", 1)[1].strip('"') for line in text.splitlines() if "main:" in line)
    config.write_text(text.replace(original, str(other)))
    found(verify(64), " is corpus ", "data.corpora.main")
    flip_bit(other / "manifest.json", 20)
    found(verify(64), "manifest.json", "data.corpora.main")
    config.write_text(text.replace(original, "/nowhere"))
    answer = verify(0)
    assert answer["checked"]["corpora"] == 0
    assert "corpus main is not reachable: it is not at /nowhere" in answer["notes"]


def test_damage_of_the_run_weighs_more_than_another_corpus(run_dir: Path, verify: Verify, tmp_path: Path) -> None:
    config = run_dir / "config" / "attempt-0002.yaml"
    original = next(line.split(": ", 1)[1].strip('"') for line in config.read_text().splitlines() if "main:" in line)
    config.write_text(config.read_text().replace(original, str(write_corpus(tmp_path / "o", words=("x", "y")))))
    flip_bit(run_dir / NEWEST / "state.json", 5)
    verify(65)


def test_damaged_run_record_ends_with_65(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip_bit(run_dir / "run.json", 100)
    assert main(["verify", "run", str(run_dir), "--json"]) == 65
    assert "run.json does not have the sha256 that it states" in capsys.readouterr().err


def test_folder_that_is_no_run_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "run", str(tmp_path), "--json"]) == 2
    assert "is not a run directory" in capsys.readouterr().err
