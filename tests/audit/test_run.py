"""verify run: a run that tells one story passes; whatever is changed in it is found, with its file and line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megamask.storage.hashing import canonical_json, hash_of, sha256_bytes
from megamask_pipelines.cli.main import main
from support.journalled_run import JournalledRun, write_journalled_run
from support.shards import flip_bit
from support.tiny_run import write_corpus


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("told")
    return write_journalled_run(folder, write_corpus(folder / "data"))


@pytest.fixture
def run_dir(told: Path, tmp_path: Path) -> Path:
    """A copy whose attempts are over: the claims name no living process."""
    copy = Path(shutil.copytree(told, tmp_path / "run"))
    for path in copy.glob("attempts/*/claim.json"):
        path.write_text(path.read_text().replace(f'"pid": {os.getpid()}', '"pid": 999999999'))
    return copy


@pytest.fixture
def verify(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Runs the verb and returns its answer; the exit code is the answer's."""

    def run(code: int) -> dict[str, Any]:
        assert main(["verify", "run", str(run_dir), "--json"]) == code
        answer: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert answer["exit_code"] == code
        assert answer["ok"] is (code == 0)
        assert bool(answer["findings"]) is (code != 0)
        assert main(["verify", "run", str(run_dir)]) == code
        text = capsys.readouterr().out
        assert text.count("found: ") == len(answer["findings"])
        return answer

    return run


Verify = Callable[..., dict[str, Any]]


def found(answer: dict[str, Any], problem: str, file: str | None = None, line: int | None = None) -> None:
    """One of the findings says so, there."""
    matches = [entry for entry in answer["findings"] if problem in entry["problem"]]
    assert matches, answer["findings"]
    assert file is None or any(entry["file"] == file for entry in matches), matches
    assert line is None or any(entry["line"] == line for entry in matches), matches


def lines_of(run_dir: Path, attempt: int) -> list[dict[str, Any]]:
    path = run_dir / "journal" / f"attempt-{attempt:04d}-000.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def rewrite(run_dir: Path, change: Callable[[int, list[dict[str, Any]]], object]) -> None:
    """Changes journal lines and chains all of them anew, as a forger would; commits keep what they name."""
    previous, seq = "0" * 64, 0
    for attempt in (1, 2):
        lines = lines_of(run_dir, attempt)
        change(attempt, lines)
        data = b""
        for line in lines:
            seq += 1
            line.update(seq=seq, prev=previous)
            text = json.dumps(line, separators=(",", ":"), ensure_ascii=False).encode()
            previous = sha256_bytes(text)
            data += text + b"\n"
        (run_dir / "journal" / f"attempt-{attempt:04d}-000.jsonl").write_bytes(data)


def place(lines: list[dict[str, Any]], kind: str, step: int | None = None) -> int:
    return next(n for n, line in enumerate(lines) if line["kind"] == kind and step in (None, line.get("step")))


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
    """What the forgeries below change is what is found; alone it gives the same bytes."""
    rewrite(run_dir, lambda attempt, lines: None)
    verify(0)


def test_journal_in_many_files_passes(told: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = told.parent / "data" / "corpus"
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


# Checkpoints.

NEWEST = "checkpoints/step-00000006-a0002"


@pytest.mark.parametrize("name", ["state-00000.safetensors", "state.json", "model.json", "tokenizer/tokenizer.json"])
def test_flipped_byte_of_any_checkpoint_is_found(run_dir: Path, verify: Verify, name: str) -> None:
    for folder in ("checkpoints/step-00000004-a0001", NEWEST):
        path = run_dir / folder / name
        flip_bit(path, path.stat().st_size // 2)
        found(verify(65), name, folder)
        flip_bit(path, path.stat().st_size // 2)


def recommit(folder: Path, **changes: Any) -> None:
    """A COMMIT.json that is true of its files and says something else."""
    document = {**json.loads((folder / "COMMIT.json").read_bytes()), **changes}
    del document["self_sha256"]
    (folder / "COMMIT.json").write_bytes(canonical_json({**document, "self_sha256": hash_of(document)}))


@pytest.mark.promise("`megamask verify run` accepts a consistent run, and names file and line of every contradiction")
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"run_id": "other"}, "run_id is 'other'"),
        ({"corpora": {"main": "0" * 64}}, "corpora is"),
        ({"journal": {"seq": 3, "sha256": "0" * 64}}, "line 3 of the journal"),
        ({"journal": {"seq": [], "sha256": None}}, "line [] of the journal"),
        ({"journal": {}}, "line None of the journal"),
        ({"parent": None}, "parent is '"),
        ({"parent": "f" * 64}, "parent is '"),
    ],
)
def test_commit_that_contradicts_the_run_is_found(run_dir: Path, verify: Verify, change: Any, problem: str) -> None:
    recommit(run_dir / NEWEST, **change)
    found(verify(65), problem)


def test_commit_that_names_another_place_of_the_journal_is_found(run_dir: Path, verify: Verify) -> None:
    path = run_dir / "journal" / "attempt-0001-000.jsonl"
    lines = path.read_bytes().splitlines()
    step = next(n for n, line in enumerate(lines) if b'"kind":"step"' in line and b'"step":3' in line)
    recommit(run_dir / NEWEST, journal={"seq": step + 1, "sha256": sha256_bytes(lines[step])})
    answer = verify(65)
    found(answer, "step is 6; the journal is at 3 there", f"{NEWEST}/COMMIT.json")
    found(answer, "it names a line of attempt 1")


@pytest.mark.promise(
    "`megamask verify run` detects a missing pinned checkpoint, and notes a commit that is missing without a record"
)
def test_newest_commit_that_is_gone_is_found_and_a_pruned_one_is_not(run_dir: Path, verify: Verify) -> None:
    shutil.rmtree(run_dir / "checkpoints" / "step-00000004-a0001")
    answer = verify(0)  # a prune that was not journalled any more
    note = "step-00000004-a0001 was committed and is gone, and no line records that it was pruned"
    assert [entry for entry in answer["notes"] if "gone" in entry] == [note]
    (run_dir / NEWEST / "COMMIT.json").unlink()
    found(verify(65), "step-00000006-a0002 was committed and never pruned", "journal/attempt-0002-000.jsonl")


@pytest.mark.promise(
    "`megamask verify run` detects a missing pinned checkpoint, and notes a commit that is missing without a record"
)
def test_pinned_checkpoint_that_is_gone_is_found_and_one_that_is_there_is_not(run_dir: Path, verify: Verify) -> None:
    (run_dir / "checkpoints" / "step-00000004-a0001.pinned").touch()
    verify(0)
    (run_dir / "checkpoints" / "step-00000004-a0001" / "COMMIT.json").unlink()
    found(verify(65), "is pinned, but there is no such", "checkpoints/step-00000004-a0001.pinned")
    shutil.rmtree(run_dir / "checkpoints" / "step-00000004-a0001")
    answer = verify(65)
    found(answer, "step-00000004-a0001 is pinned, but there is no such checkpoint")
    assert not [entry for entry in answer["notes"] if "gone" in entry]


@pytest.mark.promise(
    "`megamask verify run` detects a missing pinned checkpoint, and notes a commit that is missing without a record"
)
def test_pin_of_a_checkpoint_that_was_pruned_or_never_was_is_found(run_dir: Path, verify: Verify) -> None:
    for name in ("step-00000002-a0001", "step-5"):
        pin = run_dir / "checkpoints" / f"{name}.pinned"
        pin.touch()
        found(verify(65), f"{name} is pinned, but there is no such checkpoint", f"checkpoints/{name}.pinned")
        pin.unlink()
    verify(0)


# Attempts, configs, corpora.


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


# Commits told of late, and other versions.


@pytest.mark.promise(
    "a commit recorded by the attempt that resumes from it is valid; any differing field of that line is detected"
)
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        (
            {"checkpoint": "step-00000004-a0002"},
            "checkpoint is 'step-00000004-a0002'; it must be 'step-00000004-a0001'",
        ),
        ({"step": 3}, "step is 3; it must be 4"),
        ({"location": "/tmp/x"}, "location is '/tmp/x'"),
        ({"digest": "0" * 64}, "digest is '0000"),
        ({"parent": "0" * 64}, "parent is '0000"),
        ({"bytes": 1}, "bytes is 1"),
    ],
)
def test_commit_that_the_next_attempt_told_of_is_whole_when_it_is_the_one_resumed_from(
    told: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], problem: str | None
) -> None:
    run = JournalledRun(tmp_path, told.parent / "data" / "corpus")
    run.start(None)
    run.step(1)
    run.step(2)
    run.commit(2)
    run.step(3)
    run.step(4)
    last = run.commit(4, is_told=False)
    run.journal.close()
    run.start(last)
    run.tell(last, stall_s=None, save_s=None, **change)
    run.step(5)
    run.step(6)
    run.commit(6)
    run.complete(6)
    run.journal.close()
    assert main(["verify", "run", str(run.run_dir), "--json"]) == (0 if problem is None else 65)
    answer = json.loads(capsys.readouterr().out)
    if problem is None:
        assert not [note for note in answer["notes"] if "was not announced" in note]
    else:
        found(answer, problem, "journal/attempt-0002-000.jsonl", 2)


@pytest.mark.promise("a commit is recorded once")
def test_commit_that_was_told_of_already_is_not_told_of_again(run_dir: Path, verify: Verify) -> None:
    lines = lines_of(run_dir, 1)
    again = lines[place(lines, "checkpoint_committed", 4)]

    def forge(attempt: int, lines: list[dict[str, Any]]) -> None:
        if attempt == 2:
            lines.insert(place(lines, "attempt_started") + 1, dict(again))

    rewrite(run_dir, forge)
    found(verify(65), "checkpoint is 'step-00000004-a0001'; it must be 'step-00000004-a0002'")


def rewrite_record(run_dir: Path, section: str, **values: Any) -> None:
    """A run.json that is true of itself; "gone" takes a key away."""
    path = run_dir / "run.json"
    content = json.loads(path.read_bytes())
    del content["self_sha256"]
    content[section].update(values)
    content[section] = {name: value for name, value in content[section].items() if value != "gone"}

    def to_bytes(document: dict[str, Any]) -> bytes:
        return json.dumps(document, indent=2, sort_keys=True).encode() + b"\n"

    path.write_bytes(to_bytes({**content, "self_sha256": sha256_bytes(to_bytes(content))}))


@pytest.mark.promise("an unknown training key in run.json is a finding; a missing one has its default")
def test_key_of_run_json_that_this_version_lacks_is_a_finding(run_dir: Path, verify: Verify) -> None:
    rewrite_record(run_dir, "identity", **{"training.of_tomorrow": 3})
    found(verify(65), "training.of_tomorrow is recorded as 3, but this version has no such key")


@pytest.mark.promise("an unknown training key in run.json is a finding; a missing one has its default")
def test_key_that_run_json_does_not_have_yet_stands_at_its_default(run_dir: Path, verify: Verify) -> None:
    rewrite_record(run_dir, "identity", **{"objective.complementary": "gone"})
    assert all("sha256" in entry["problem"] for entry in verify(65)["findings"])  # of the bytes, and nothing else


@pytest.mark.promise("a run.json without an identity key ends with 2 and names the key")
@pytest.mark.parametrize(
    ("section", "key", "value", "problem"),
    [
        ("identity", "training.sequence_length", "gone", "does not say training.sequence_length"),
        ("identity", "training.global_batch_size", "x", "has training.global_batch_size = 'x'"),
        ("identity", "training.batch_size_ramp_start", 0, "has training.batch_size_ramp_start = 0"),
        ("identity", "objective.complementary", 1, "has objective.complementary = 1"),
        ("extendable", "training.steps", "gone", "does not say training.steps"),
    ],
)
def test_run_json_without_what_a_run_is_ends_as_a_usage_error_that_names_the_key(
    run_dir: Path, capsys: pytest.CaptureFixture[str], section: str, key: str, value: Any, problem: str
) -> None:
    rewrite_record(run_dir, section, **{key: value})
    assert main(["verify", "run", str(run_dir)]) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert "Nothing was checked." in error
