"""`megamask train` as its user sees it: contract, resuming, refusals, exit codes, journals."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megamask.data.tokenizer import CorpusTokenizer
from megamask.generation.confidence import DecodingOptions
from megamask.generation.prompt import until_end
from megamask_pipelines.sample import SampleRequest, sample
from support.command import checkpoints, command, environment, journal, megamask, start, step_lines, tiny

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def finished(runs: Path, small_corpus: Path) -> Path:
    """A tiny run that has done its 20 steps."""
    done = megamask("train", *tiny(small_corpus, runs, "finished"), "--json")
    assert done.code == 0, done.stderr
    answer = done.json
    assert answer["exit_code"] == 0
    assert answer["step"] == 20
    assert answer["run_dir"] == str(runs / "finished")
    assert math.isfinite(answer["loss"])
    return runs / "finished"


def copy_of(run_dir: Path, name: str) -> Path:
    return Path(shutil.copytree(run_dir, run_dir.parent / name))


def test_run_directory_holds_what_the_formats_promise(finished: Path) -> None:
    record = json.loads((finished / "run.json").read_text())
    assert len(record["run_id"]) == 32
    assert record["laws"] == {"order": 1, "noise": 1, "weights": 1, "likelihood": 1}
    status = json.loads((finished / "status.json").read_text())
    assert (status["phase"], status["exit_code"], status["attempt"], status["step"]) == ("done", 0, 1, 20)
    assert (finished / "config" / "attempt-0001.yaml").is_file()
    assert (finished / "attempts" / "0001" / "claim.json").is_file()
    assert [folder.name for folder in checkpoints(finished)] == ["step-00000010-a0001", "step-00000020-a0001"]
    assert (finished / "checkpoints" / "latest").read_text().strip() == "step-00000020-a0001"


def test_journal_tells_the_run_in_order(finished: Path) -> None:
    records = journal(finished)
    kinds = [record["kind"] for record in records if record["kind"] != "step"]
    assert kinds == [
        "run_started",
        "attempt_started",
        *["checkpoint_started", "checkpoint_committed"] * 2,
        "attempt_ended",
        "run_completed",
    ]
    steps = [record for record in records if record["kind"] == "step"]
    assert [record["step"] for record in steps] == list(range(1, 21))
    assert [record["consumed_samples"] for record in steps] == [8 * step for step in range(1, 21)]
    assert all(set(record["seconds"]) == {"data", "forward_backward", "optimizer", "other"} for record in steps)
    rates = [record["learning_rate"] for record in steps]
    assert rates == pytest.approx([3e-3 * min(step, 10) / 10 for step in range(1, 21)])


@pytest.mark.promise("two runs of one config have equal journals")
def test_two_runs_of_one_config_have_equal_step_lines(finished: Path, runs: Path, small_corpus: Path) -> None:
    assert megamask("train", *tiny(small_corpus, runs, "again"), "--json").code == 0
    assert step_lines(runs / "again") == step_lines(finished)


@pytest.mark.promise("previews change no step, bit for bit, on any layout")
@pytest.mark.promise("a preview in the journal equals what `megamask sample` writes with the checkpoint of that step")
def test_previews_change_no_step_line_and_are_what_sample_writes(
    finished: Path, runs: Path, small_corpus: Path
) -> None:
    """A preview is the first block of a row that `megamask sample` fills with the checkpoint of that step."""
    asked = ["preview.every_steps=10", "preview.prompts=['def value', '']", "preview.num_tokens=9"]
    noise = ["preview.temperature=0.8", "preview.denoising_steps=9"]
    done = megamask("train", *tiny(small_corpus, runs, "previews"), *asked, *noise)
    assert done.code == 0, done.stderr
    assert step_lines(runs / "previews") == step_lines(finished)
    records = [record for record in journal(runs / "previews") if record["kind"] == "sample_preview"]
    assert [record["step"] for record in records] == [10, 20]
    assert done.stderr.count("preview at step 10: ") == done.stderr.count("preview at step 20: ") == 2
    prompt = CorpusTokenizer.load(small_corpus / "tokenizer").encode("def value")
    for record, checkpoint in zip(records, checkpoints(runs / "previews"), strict=True):
        options = DecodingOptions(block_length=9, temperature=0.8, seed=record["seed"])
        length = 64 - len(prompt)
        written = sample(checkpoint, SampleRequest(prompt="def value", length=length, options=options))
        tokens = written["tokens"][len(prompt) : len(prompt) + 9]
        tokenizer = CorpusTokenizer.load(small_corpus / "tokenizer")
        assert record["samples"][0]["text"] == tokenizer.decode(until_end(tokens, tokenizer.eod_token_id))
        assert record["samples"][0]["text"] and record["samples"][0]["nfe"] == 9


def test_the_same_command_on_a_complete_run_starts_nothing(finished: Path, runs: Path, small_corpus: Path) -> None:
    before = sorted(path for path in finished.rglob("*"))
    done = megamask("train", *tiny(small_corpus, runs, "finished"), "--json")
    assert done.code == 0
    assert done.json["step"] == 20
    assert sorted(path for path in finished.rglob("*")) == before


@pytest.mark.promise("a stopped run continues as if it had not stopped")
@pytest.mark.promise("the time to start, by phase, and to restore is journalled")
def test_stopped_run_continues_as_if_it_had_not_stopped(finished: Path, runs: Path, small_corpus: Path) -> None:
    arguments = tiny(small_corpus, runs, "stopped")
    done = megamask("train", *arguments, "training.stop_after_step=7", "--json")
    assert (done.code, done.json["step"]) == (0, 7), done.stderr
    status = json.loads((runs / "stopped" / "status.json").read_text())
    assert (status["phase"], status["exit_code"]) == ("stopped", 0)
    done = megamask("train", *arguments, "--json")
    assert (done.code, done.json["step"]) == (0, 20), done.stderr
    assert step_lines(runs / "stopped") == step_lines(finished)
    started = [record for record in journal(runs / "stopped") if record["kind"] == "attempt_started"]
    assert started[1]["resumed_from"]["step"] == 7
    assert started[0]["restore_s"] is None and started[1]["restore_s"] == started[1]["startup_s"]["restore"] > 0
    for phases in (record["startup_s"] for record in started):
        assert set(phases) == {"imports", "engine", "restore", "total"}
        assert phases["imports"] + phases["engine"] + phases["restore"] <= phases["total"]


@pytest.mark.promise("an extended run equals the longer run")
def test_extended_run_equals_the_longer_run(runs: Path, small_corpus: Path) -> None:
    short = tiny(small_corpus, runs, "extended", "training.steps=6", "optimizer.warmup_steps=3")
    long = tiny(small_corpus, runs, "long", "training.steps=9", "optimizer.warmup_steps=3")
    assert megamask("train", *short).code == 0
    assert megamask("train", *short, "training.steps=9").code == 0
    assert megamask("train", *long).code == 0
    assert step_lines(runs / "extended") == step_lines(runs / "long")
    growth = [r["extended"] for r in journal(runs / "extended") if r["kind"] == "attempt_started"]
    assert growth == [None, {"training.steps": [6, 9]}]


@pytest.mark.promise("another identity is refused and the field named")
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.seed=2", ["run.seed", "2", "1"]),
        ("training.global_batch_size=4", ["training.global_batch_size", "4", "8"]),
        ("training.steps=19", ["training.steps", "may only grow"]),
    ],
)
def test_resuming_another_identity_is_refused_and_names_the_field(
    finished: Path, runs: Path, small_corpus: Path, override: str, words: list[str]
) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    done = megamask("train", *tiny(small_corpus, runs, "finished", override), "--json")
    assert done.code == 2
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr
    assert done.json["exit_code"] == 2
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_folder_that_is_no_run_is_left_alone(runs: Path, small_corpus: Path) -> None:
    (runs / "papers").mkdir()
    (runs / "papers" / "thesis.tex").write_text("x")
    done = megamask("train", *tiny(small_corpus, runs, "papers"))
    assert done.code == 2
    assert "thesis.tex" in done.stderr
    assert [path.name for path in (runs / "papers").iterdir()] == ["thesis.tex"]


def wait_for_step(run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (run_dir / "journal").is_dir() or not any(r.get("step") == step for r in complete_lines(run_dir)):
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.05)


def complete_lines(run_dir: Path) -> list[dict[str, object]]:
    files = sorted((run_dir / "journal").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().split("\n")[:-1]]


@pytest.mark.promise("a second live process on a run is refused")
def test_second_live_process_on_the_same_run_is_refused(runs: Path, small_corpus: Path) -> None:
    arguments = tiny(small_corpus, runs, "busy", "training.steps=100000")
    first = start("train", *arguments)
    wait_for_step(runs / "busy", 1)
    second = megamask("train", *arguments)
    assert second.code == 2
    assert "running" in second.stderr
    assert "Traceback" not in second.stderr
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=120)
    assert first.returncode == 93


@pytest.mark.promise("an attempt in another pid namespace takes over; the older ends with 93 and writes nothing more")
@pytest.mark.parametrize("ranks", [1, 2])
def test_older_attempt_stops_with_93_when_a_newer_one_claims_the_run(
    runs: Path, small_corpus: Path, ranks: int
) -> None:
    name = f"superseded-{ranks}"
    arguments = tiny(small_corpus, runs, name, "training.steps=100000", f"layout.data_parallel_size={ranks}")
    process = start("train", *arguments, "--json")
    wait_for_step(runs / name, 2)
    claim = json.loads((runs / name / "attempts" / "0001" / "claim.json").read_text())
    (runs / name / "attempts" / "0002").mkdir()
    newer = {**claim, "attempt": 2, "host": "another-host"}
    (runs / name / "attempts" / "0002" / "claim.json").write_text(json.dumps(newer))
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 93, stderr
    answer = json.loads(stdout.splitlines()[-1])
    assert answer["exit_code"] == 93
    # between two steps the loop sees the claim; at a commit the check before publishing does
    assert "newer attempt" in answer["reason"] or "superseded by attempt 2" in answer["reason"]
    assert checkpoints(runs / name) == []
    assert "attempt_ended" not in [record["kind"] for record in complete_lines(runs / name)]


@pytest.mark.promise("a signal saves and ends with its code")
@pytest.mark.parametrize(
    ("number", "code", "phase"),
    [(signal.SIGTERM, 75, "preempted"), (signal.SIGUSR1, 75, "preempted"), (signal.SIGINT, 93, "stopped")],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_signal_saves_and_ends_with_its_code(
    runs: Path, small_corpus: Path, number: signal.Signals, code: int, phase: str, ranks: int
) -> None:
    if ranks == 2 and number is signal.SIGUSR1:
        pytest.skip("SIGUSR1 takes SIGTERM's path through the launcher")
    name = f"signal-{number.name}-{ranks}"
    arguments = tiny(small_corpus, runs, name, "training.steps=100000", f"layout.data_parallel_size={ranks}")
    process = start("train", *arguments, "--json")
    wait_for_step(runs / name, 3)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == code, stderr
    answer = json.loads(stdout.splitlines()[-1])
    assert answer["exit_code"] == code
    status = json.loads((runs / name / "status.json").read_text())
    assert (status["phase"], status["exit_code"]) == (phase, code)
    [commit] = checkpoints(runs / name)[-1:]
    assert commit.name.startswith(f"step-{answer['step']:08d}")


@pytest.mark.promise("a loss that is not finite ends with 66 and keeps the last checkpoint")
def test_non_finite_loss_ends_with_66_and_keeps_the_last_checkpoint(runs: Path, small_corpus: Path) -> None:
    arguments = tiny(small_corpus, runs, "exploding", "checkpoint.every_steps=1", "optimizer.learning_rate=1e30")
    done = megamask("train", *arguments, "--json")
    assert done.code == done.json["exit_code"] == 66
    assert {"run_id", "run_dir", "step", "loss", "exit_code", "reason"} <= done.json.keys()
    assert "Traceback" not in done.stderr
    records = journal(runs / "exploding")
    [incident] = [record for record in records if record["kind"] == "incident"]
    first = (incident["step"] - 1) * 8
    assert incident["sample_indices"] == list(range(first, first + 8))
    last_good = max(record["step"] for record in records if record["kind"] == "step")
    assert incident["step"] == last_good + 1
    assert checkpoints(runs / "exploding")[-1].name.startswith(f"step-{last_good:08d}")
    assert megamask("verify", "checkpoint", runs / "exploding").code == 0
    assert json.loads((runs / "exploding" / "status.json").read_text())["exit_code"] == 66


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def damage(folder: Path) -> None:
    flip_last_byte(max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size))


@pytest.mark.promise("a damaged checkpoint is passed over with an incident")
def test_damaged_checkpoint_falls_back_with_an_incident(finished: Path, runs: Path, small_corpus: Path) -> None:
    run_dir = copy_of(finished, "fallback")
    damage(checkpoints(run_dir)[-1])
    done = megamask("train", *tiny(small_corpus, runs, "fallback", "training.steps=21"), "--json")
    assert (done.code, done.json["step"]) == (0, 21), done.stderr
    incidents = [record for record in journal(run_dir) if record["kind"] == "incident"]
    assert any("step-00000020-a0001" in json.dumps(record) for record in incidents)
    repeated = {step: line for step, line in step_lines(run_dir).items() if step <= 20}
    assert repeated == step_lines(finished)


@pytest.mark.promise("the run ends with 65 when no intact checkpoint remains")
def test_no_checkpoint_left_ends_with_65(finished: Path, runs: Path, small_corpus: Path) -> None:
    run_dir = copy_of(finished, "ruined")
    for folder in checkpoints(run_dir):
        damage(folder)
    done = megamask("train", *tiny(small_corpus, runs, "ruined", "training.steps=21"))
    assert done.code == 65
    assert "Traceback" not in done.stderr
    assert json.loads((run_dir / "status.json").read_text())["exit_code"] == 65


@pytest.mark.promise("a damaged row ends with 64")
def test_damaged_row_ends_with_64_on_one_and_on_two_ranks(runs: Path, small_corpus: Path, tmp_path: Path) -> None:
    corpus = Path(shutil.copytree(small_corpus, tmp_path / "corpus"))
    shard = corpus / "shards" / "train-000000.tar"
    data = bytearray(shard.read_bytes())
    for offset in range(0, len(data), 50):
        data[offset] ^= 1
    shard.write_bytes(bytes(data))
    for ranks in (1, 2):
        name = f"damaged-{ranks}"
        done = megamask("train", *tiny(corpus, runs, name, f"layout.data_parallel_size={ranks}"))
        assert done.code == 64, done.stderr
        assert "train-000000.tar" in done.stderr
        assert done.stderr.count("error:") == 1, done.stderr
        assert "Traceback" not in done.stderr
        assert json.loads((runs / name / "status.json").read_text())["exit_code"] == 64


def test_missing_corpus_leaves_no_run_directory(runs: Path, tmp_path: Path) -> None:
    done = megamask("train", *tiny(tmp_path / "nowhere", runs, "unborn"))
    assert done.code == 2
    assert "data.corpora.main" in done.stderr
    assert not (runs / "unborn").exists()


def test_other_number_of_processes_than_the_layout_s_is_refused_before_the_run_exists(
    runs: Path, small_corpus: Path
) -> None:
    arguments = command("train", *tiny(small_corpus, runs, "mismatch"), "--json")
    launched = {**environment(), "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = subprocess.run(arguments, capture_output=True, text=True, env=launched, timeout=60)
    assert done.returncode == 2, done.stderr
    assert "layout" in done.stderr
    assert "WORLD_SIZE" in done.stderr
    assert not (runs / "mismatch").exists()
