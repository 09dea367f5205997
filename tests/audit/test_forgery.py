"""Forged records: each is rewritten as far as one file allows, and must be found."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megamask.errors import CheckpointIntegrityError
from megamask.runs.record import read_run
from megamask.storage.hashing import sha256_bytes
from megamask.training.resuming import recorded_schedule
from megamask_pipelines.cli.main import main
from support.stored_run import unpack

FORGED = pytest.mark.promise("`megamask verify run` finds records that were forged together with their own digest")
Check = Callable[..., dict[str, Any]]


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Check:
    def run(folder: Path, code: int, *arguments: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["verify", "run", str(folder), *arguments, "--json"]) == code
        answer: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return answer

    return run


def problems(answer: dict[str, Any]) -> str:
    return "\n".join(f"{entry['file']}: {entry['problem']}" for entry in answer["findings"])


def forge_record(run_dir: Path, *, keeps_digest: bool = True, code_version: str | None = None, **identity: Any) -> None:
    """Change run.json and redo its own digest, or remove that."""
    path = run_dir / "run.json"
    content = json.loads(path.read_bytes())
    content.pop("self_sha256")
    content["identity"] |= {name.replace("__", "."): value for name, value in identity.items()}
    if code_version is not None:
        content["code_version"] = code_version
    if keeps_digest:
        content["self_sha256"] = sha256_bytes((json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def forge_configs(run_dir: Path, old: str, new: str) -> None:
    for path in (run_dir / "config").iterdir():
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))


def last_journal(run_dir: Path) -> Path:
    return max((run_dir / "journal").iterdir())


def test_run_that_nobody_touched_passes(run_dir: Path, check: Check) -> None:
    check(run_dir, 0)


@FORGED
def test_learning_rate_changed_with_its_digest_and_configs_is_found(run_dir: Path, check: Check) -> None:
    forge_record(run_dir, optimizer__learning_rate=0.002)
    forge_configs(run_dir, "learning_rate: 0.001", "learning_rate: 0.002")
    found = problems(check(run_dir, 65))
    assert "the schedule has" in found
    assert "when this line was written it had" in found


@FORGED
def test_learning_rate_of_a_run_whose_journal_names_no_record_is_found(tmp_path: Path, check: Check) -> None:
    """A run of the version before: only the schedule contradicts the forged rate."""
    run_dir = unpack(tmp_path)
    corpus = f"--corpus=main={tmp_path / 'corpus'}"
    check(run_dir, 0, corpus)
    forge_record(run_dir, optimizer__learning_rate=0.002)
    forge_configs(run_dir, "learning_rate: 0.001", "learning_rate: 0.002")
    assert problems(check(run_dir, 65, corpus)).count("the schedule has") == 6


@FORGED
def test_seed_changed_with_its_digest_and_configs_is_found(run_dir: Path, check: Check) -> None:
    seed = json.loads((run_dir / "run.json").read_bytes())["identity"]["run.seed"]
    forge_record(run_dir, run__seed=seed + 1)
    forge_configs(run_dir, f"seed: {seed}", f"seed: {seed + 1}")
    assert "run.seed is" in problems(check(run_dir, 65))


@FORGED
def test_record_whose_digest_was_deleted_is_found(run_dir: Path, check: Check) -> None:
    forge_record(run_dir, keeps_digest=False)
    assert "sha256" in problems(check(run_dir, 65))


@FORGED
def test_code_version_is_that_of_the_first_attempt(tmp_path: Path, check: Check) -> None:
    run_dir = unpack(tmp_path)
    forge_record(run_dir, code_version="0" * 12)
    assert "code_version" in problems(check(run_dir, 65))


@FORGED
def test_last_attempt_removed_while_status_names_it_is_found(run_dir: Path, check: Check) -> None:
    last_journal(run_dir).unlink()
    (run_dir / "config" / "attempt-0002.yaml").unlink()
    shutil.rmtree(run_dir / "attempts" / "0002")
    shutil.rmtree(run_dir / "checkpoints" / "step-00000006-a0002")
    assert "it names attempt 2, which the journal does not have" in problems(check(run_dir, 65))


@FORGED
@pytest.mark.parametrize("num_lines", [1, 2])
def test_last_lines_cut_off_are_found(run_dir: Path, check: Check, num_lines: int) -> None:
    path = last_journal(run_dir)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-num_lines]))
    assert "status.json" in problems(check(run_dir, 65))


@FORGED
def test_last_line_of_a_failed_attempt_that_is_cut_is_found(run_dir: Path, check: Check) -> None:
    """status.json alone says whether the attempt journalled its end or the launcher saw it: it names the line."""
    status = json.loads((run_dir / "status.json").read_bytes())
    status |= {"phase": "failed", "exit_code": 66, "step": 6}
    path = last_journal(run_dir)
    kept = path.read_text().splitlines(keepends=True)
    ended = next(n for n, line in enumerate(kept) if '"kind":"attempt_ended"' in line)
    path.write_text("".join(kept[:ended]))
    (run_dir / "status.json").write_text(json.dumps({**status, "journal": None}))
    check(run_dir, 0)
    (run_dir / "status.json").write_text(json.dumps(status))
    assert f"ended with line {status['journal'][0]}, which the journal lacks" in problems(check(run_dir, 65))


@FORGED
def test_record_that_was_changed_with_its_digest_is_not_resumed(run_dir: Path) -> None:
    record = read_run(run_dir)
    assert recorded_schedule(record)[1] == 6
    forge_record(run_dir, optimizer__learning_rate=0.002)
    with pytest.raises(CheckpointIntegrityError, match=r"it was changed since\. Nothing was started"):
        recorded_schedule(read_run(run_dir))


@FORGED
def test_steps_of_the_newest_config_are_those_that_were_taken(run_dir: Path, check: Check) -> None:
    path = run_dir / "config" / "attempt-0002.yaml"
    path.write_text(path.read_text().replace("steps: 6", "steps: 9"))
    assert "training.steps is 9; attempt 2 ended at step 6" in problems(check(run_dir, 65))


@FORGED
def test_evaluation_line_that_contradicts_the_commit_is_found(run_dir: Path, check: Check) -> None:
    path, previous = last_journal(run_dir), None
    lines = []
    for text in path.read_text().splitlines():
        line = json.loads(text)
        if line["kind"] == "evaluation":
            line["nelbo_nats_per_token"] = 3.3
        if previous is not None:
            line["prev"] = sha256_bytes(previous)
        previous = json.dumps(line, separators=(",", ":"), ensure_ascii=False).encode()
        lines.append(previous + b"\n")
    path.write_bytes(b"".join(lines))
    assert "the evaluation line of step 6 has" in problems(check(run_dir, 65))


@FORGED
def test_expected_head_holds_a_run_against_what_was_written_down(run_dir: Path, check: Check) -> None:
    head = check(run_dir, 0)["head"]
    assert head == {
        "seq": json.loads(last_journal(run_dir).read_text().splitlines()[-1])["seq"],
        "sha256": sha256_bytes(last_journal(run_dir).read_bytes().splitlines()[-1]),
    }
    check(run_dir, 0, "--expect-head", f"{head['seq']}:{head['sha256']}")
    found = problems(check(run_dir, 65, "--expect-head", f"{head['seq']}:{'0' * 64}"))
    assert "--expect-head" in found


@pytest.mark.parametrize("text", ["", "7", "7:abc", f"x:{'0' * 64}"])
def test_expected_head_of_another_form_is_refused(run_dir: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    assert main(["verify", "run", str(run_dir), "--expect-head", text]) == 2
    assert "N:SHA" in capsys.readouterr().err


@FORGED
def test_shard_replaced_under_an_old_manifest_is_found_with_data(tmp_path: Path, check: Check) -> None:
    run_dir = unpack(tmp_path)
    shard = tmp_path / "corpus" / "shards" / "train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    corpus = f"--corpus=main={tmp_path / 'corpus'}"
    answer = check(run_dir, 0, corpus)
    assert "the corpora's shards (--data)" in answer["not_covered"]
    damaged = check(run_dir, 64, corpus, "--data")
    assert damaged["findings"]
    assert not any("every byte" in what or "content" in what for what in damaged["covered"])
    shard.parent.rename(tmp_path / "away")
    (tmp_path / "corpus" / "manifest.json").unlink()
    away = check(run_dir, 0, corpus, "--data")
    assert not any("corpora" in what or "content" in what for what in away["covered"])
    assert "corpus main (not reachable; --corpus main=FOLDER)" in away["not_covered"]


@FORGED
def test_content_of_every_step_is_recomputed_with_data(tmp_path: Path, check: Check) -> None:
    run_dir = unpack(tmp_path)
    corpus = f"--corpus=main={tmp_path / 'corpus'}"
    assert {"every byte of corpus main", "the content of 6 steps"} <= {*check(run_dir, 0, corpus, "--data")["covered"]}
    path = run_dir / "journal" / "attempt-0002-000.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    [number] = [n for n, line in enumerate(lines) if json.loads(line).get("step") == 6 and '"kind":"step"' in line]
    step = json.loads(lines[number])
    lines[number] = lines[number].replace(step["content_digest"], "0" * 16)
    path.write_text("".join(lines))
    assert "content_digest of step 6" in problems(check(run_dir, 65, corpus, "--data"))


def test_answer_does_not_depend_on_the_working_folder(
    tmp_path: Path, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = unpack(tmp_path)
    first = check(run_dir, 0)
    monkeypatch.chdir(tmp_path)  # the config's relative `corpus` is here
    assert check(run_dir, 0) == first


def test_last_line_names_what_was_not_checked(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "run", str(run_dir)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("everything agrees. Checked: run.json, attempts, journal, checkpoints")
    assert "Not checked: " in last and "--data" in last and "--evaluate" in last and "--expect-head" in last
    assert "losses and gradient norms of the steps (nothing computes them again)" in last


@pytest.fixture(scope="module")
def synced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stored run and a store that has all of it."""
    folder = tmp_path_factory.mktemp("synced")
    run_dir = unpack(folder)
    assert main(["sync", str(run_dir), "--uri", f"sqlite:///{folder}/mlflow.db"]) == 0
    return folder


@pytest.mark.multiprocess
@FORGED
def test_run_and_mlflow_are_compared_and_a_changed_journal_is_found(
    synced: Path, tmp_path: Path, check: Check, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"sqlite:///{synced}/mlflow.db"
    answer = check(synced / "run", 0, "--against-mlflow", "--uri", uri)
    assert "MLflow's parameters, points, digests and COMMIT.json artifacts" in answer["covered"]
    assert not any("--against-mlflow" in what for what in answer["not_covered"])
    forged = Path(shutil.copytree(synced / "run", tmp_path / "run"))
    path = forged / "journal" / "attempt-0001-000.jsonl"
    first = next(json.loads(line) for line in path.read_text().splitlines() if '"kind":"step"' in line)
    path.write_text(path.read_text().replace(f'"loss":{first["loss"]}', '"loss":1.25'))
    found = problems(check(forged, 65, "--against-mlflow", "--uri", uri))
    assert f"MLflow: loss_nats_per_token at step 1 is {first['loss']}; the journal has 1.25" in found
    before = (synced / "mlflow.db").read_bytes()
    assert main(["sync", str(forged), "--uri", uri]) == 65
    assert "Nothing was sent" in capsys.readouterr().err
    assert (synced / "mlflow.db").read_bytes() == before


@pytest.mark.multiprocess
@FORGED
def test_tag_head_and_artifact_that_differ_from_mlflow_are_found(synced: Path, tmp_path: Path, check: Check) -> None:
    store = shutil.copy(synced / "mlflow.db", tmp_path / "mlflow.db")
    with sqlite3.connect(store) as connection:
        connection.execute("UPDATE tags SET value = '3:0' WHERE key = 'journal_head'")
        connection.execute("UPDATE tags SET value = 'none' WHERE key = 'tokenizer_digest'")
        connection.execute("UPDATE params SET value = 'elsewhere' WHERE key = 'attempt_1.host'")
    kept = [(path, path.rename(path.with_name("away"))) for path in synced.glob("mlartifacts/**/COMMIT.json")]
    uri = ("--uri", f"sqlite:///{store}")
    try:
        found = problems(check(synced / "run", 65, "--against-mlflow", *uri))
    finally:
        for path, away in kept:
            away.rename(path)
    assert "tag journal_head is 3:0, and the journal has no such line" in found
    assert "tag tokenizer_digest is 'none'; run.json has" in found
    assert "parameter attempt_1.host is 'elsewhere'; the journal has" in found
    assert found.count("the artifact COMMIT.json is missing or cannot be read") == len(kept) > 0
    assert main(["sync", str(synced / "run"), *uri]) == 65


@pytest.mark.multiprocess
@FORGED
def test_parameter_that_differs_from_mlflow_is_found(synced: Path, tmp_path: Path, check: Check) -> None:
    forged = Path(shutil.copytree(synced / "run", tmp_path / "run"))
    forge_record(forged, optimizer__learning_rate=0.002)
    forge_configs(forged, "learning_rate: 0.001", "learning_rate: 0.002")
    uri = f"sqlite:///{synced}/mlflow.db"
    assert "parameter optimizer.learning_rate is '0.001'" in problems(
        check(forged, 65, "--against-mlflow", "--uri", uri)
    )
    assert main(["sync", str(forged), "--uri", uri]) == 65
