"""Damage where a user meets it: the right exit code, a message that names the file, and nothing wrong loaded.

Every verb runs in this process unless a run must start for it, on a corpus and an untrained run of two checkpoints.
What each file's reader notices is held byte by byte in the tests of its room; what a training run does about damage is
in test_damage_while_training.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megamask.checkpoint.integrity import verify_folder
from megamask.data.manifest import open_corpus
from megamask.errors import DataIntegrityError
from megamask.storage import fault_points
from megamask_pipelines.cli import main as cli
from support.command import checkpoints, journal, tiny
from support.command import megamask as megamask_outside
from support.records import flip_byte
from support.saving import save_once
from support.tiny_run import SEQUENCE_LENGTH, write_corpus, write_run

NEWEST = "step-00000020-a0001"
OLDER = "step-00000010-a0001"
FILES = ["COMMIT.json", "state.json", "model.json", "tokenizer/tokenizer.json", "state-00000.safetensors"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, corpus/, and a run on it, run/, with checkpoints of steps 10 and 20; read-only for tests."""
    folder = tmp_path_factory.mktemp("damage")
    corpus = write_corpus(folder)
    write_run(folder, corpus, earlier_steps=[10])
    return folder


@pytest.fixture
def corpus(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "corpus", tmp_path / "corpus"))


@pytest.fixture
def run_dir(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


class Answer:
    """End of a command in this process."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.err = code, err
        self.json: dict[str, Any] = json.loads(out.splitlines()[-1])


@pytest.fixture
def megamask(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object) -> Answer:
        capsys.readouterr()
        code = cli.main([*map(str, arguments), "--json"])
        return Answer(code, *capsys.readouterr())

    return run


def refused(answer: Answer, code: int, *words: object) -> None:
    """One error, with these words and what to do, and no trace."""
    assert answer.code == answer.json["exit_code"] == code, answer.err
    assert answer.err.count("error: ") == 1
    assert "Traceback" not in answer.err
    for word in words:
        assert str(word) in answer.json["error"], answer.err
    assert any(word in answer.json["hint"] for word in ("restore", "prepare")), answer.err


def damage(path: Path, how: str) -> None:
    """One flipped byte in the middle, half the file lost, or the file lost."""
    if how == "flipped":
        flip_byte(path, path.stat().st_size // 2)
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()


HOWS = ["flipped", "truncated", "missing"]


# The corpus: 64.


def readers_of(corpus: Path, run_dir: Path, runs: Path) -> dict[str, list[object]]:
    train = tiny(corpus, runs, "new", f"training.sequence_length={SEQUENCE_LENGTH}")
    return {
        "train": ["train", *train],
        "evaluate": ["evaluate", run_dir, "--corpus", corpus, "--rows", "1"],
        "inspect": ["inspect", run_dir, "--step", "1", "--corpus", f"main={corpus}"],
        "verify": ["verify", "corpus", corpus],
    }


@pytest.mark.promise(
    "a cut or missing file of a corpus, or a changed byte of its manifest or tokenizer, ends with 64 before any write"
)
@pytest.mark.parametrize(
    ("verb", "name", "how"),
    [
        (verb, name, how)
        for verb in ("train", "evaluate", "inspect", "verify")
        for name, how in (
            ("manifest.json", "flipped"),
            ("shards/*.idx", "flipped"),
            ("shards/*.idx", "truncated"),
            ("shards/*.idx", "missing"),
            ("shards/*.tar", "truncated"),
            ("shards/*.tar", "missing"),
        )
        if (verb, name, how) != ("train", "shards/*.idx", "flipped")  # found at its first use: the next test
    ],
)
def test_damaged_corpus_ends_with_64_before_anything_is_read_or_written(
    megamask: Any, corpus: Path, run_dir: Path, tmp_path: Path, verb: str, name: str, how: str
) -> None:
    for path in corpus.glob(name):
        damage(path, how)
    answer = megamask(*readers_of(corpus, run_dir, tmp_path / "runs")[verb])
    refused(answer, 64, name.removesuffix(".json").rsplit("*", maxsplit=1)[-1])
    assert not (tmp_path / "runs").exists()


@pytest.mark.promise("a changed byte of a shard index ends training with 64 at its first use, before a step is taken")
@pytest.mark.multiprocess
def test_changed_byte_of_an_index_ends_training_with_64_at_its_first_use(
    corpus: Path, run_dir: Path, tmp_path: Path
) -> None:
    for path in corpus.glob("shards/*.idx"):
        damage(path, "flipped")
    done = megamask_outside(*readers_of(corpus, run_dir, tmp_path / "runs")["train"], "--json")
    refused(Answer(done.code, done.stdout, done.stderr), 64, "shards", ".idx", "No sample of its shard was used")
    assert [record for record in journal(tmp_path / "runs" / "new") if record["kind"] == "step"] == []
    assert checkpoints(tmp_path / "runs" / "new") == []


@pytest.mark.promise(
    "a cut or missing file of a corpus, or a changed byte of its manifest or tokenizer, ends with 64 before any write"
)
@pytest.mark.parametrize("verb", ["train", "verify"])
@pytest.mark.parametrize("name", ["tokenizer.json", "special_tokens.json"])
@pytest.mark.parametrize("how", HOWS)
def test_damaged_tokenizer_of_a_corpus_ends_with_64_before_a_checkpoint_could_copy_it(
    megamask: Any, corpus: Path, run_dir: Path, tmp_path: Path, verb: str, name: str, how: str
) -> None:
    damage(corpus / "tokenizer" / name, how)
    answer = megamask(*readers_of(corpus, run_dir, tmp_path / "runs")[verb])
    refused(answer, 64, "tokenizer", name if how == "missing" else "")
    assert not (tmp_path / "runs").exists()


@pytest.mark.promise(
    "a cut or missing file of a corpus, or a changed byte of its manifest or tokenizer, ends with 64 before any write"
)
def test_manifest_with_any_byte_flipped_is_no_manifest(corpus: Path) -> None:
    """Also where what is left makes sense: provenance.json names the manifest that was written."""
    path = corpus / "manifest.json"
    whole = path.read_bytes()
    for at in range(len(whole)):
        flip_byte(path, at)
        with pytest.raises(DataIntegrityError, match=r"manifest\.json"):
            open_corpus(corpus, "data.corpora.main")
        path.write_bytes(whole)
    assert open_corpus(corpus, "data.corpora.main").corpus_id


def test_corpus_that_lost_its_provenance_is_still_read(corpus: Path) -> None:
    (corpus / "provenance.json").unlink()
    assert open_corpus(corpus, "data.corpora.main").corpus_id


# A checkpoint: 65, or the one before.


@pytest.mark.promise("a damaged file of a checkpoint is detected by verify and skipped by readers")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", HOWS)
def test_damaged_checkpoint_is_found_by_verify_and_passed_over_by_readers(
    megamask: Any, run_dir: Path, how: str, name: str
) -> None:
    damage(run_dir / "checkpoints" / NEWEST / name, how)
    is_invisible = (name, how) == ("COMMIT.json", "missing")
    verified = megamask("verify", "checkpoint", run_dir)
    if is_invisible:
        assert (verified.code, verified.json["step"]) == (0, 10)
    else:
        refused(verified, 65, NEWEST, name)
    answer = megamask("evaluate", run_dir, "--rows", "1", "--draws", "1", "--replicates", "2")
    assert (answer.code, answer.json["step"]) == (0, 10), answer.err
    assert answer.json["checkpoint"].endswith(OLDER)
    assert ("passed over " + NEWEST in answer.err) is not is_invisible


@pytest.mark.promise("a damaged file of a checkpoint is detected by verify and skipped by readers")
@pytest.mark.parametrize("verb", [["evaluate", "--rows", "1"], ["sample"], ["verify", "checkpoint"]], ids="-".join)
def test_run_without_a_whole_checkpoint_ends_with_65(megamask: Any, run_dir: Path, verb: list[str]) -> None:
    for name in (OLDER, NEWEST):
        damage(run_dir / "checkpoints" / name / "state-00000.safetensors", "flipped")
    refused(megamask(*verb, run_dir), 65, NEWEST, "state-00000.safetensors", "Nothing was")


@pytest.mark.promise("`latest` is only a hint")
@pytest.mark.parametrize("content", [None, b"", b"step-00000010-a0001\n", b"../../etc\n", b"\xff\x00" * 9])
def test_latest_is_only_a_hint_that_no_reader_follows(megamask: Any, run_dir: Path, content: bytes | None) -> None:
    latest = run_dir / "checkpoints" / "latest"
    latest.unlink()
    if content is not None:
        latest.write_bytes(content)
    assert megamask("verify", "checkpoint", run_dir).json["step"] == 20
    assert megamask("evaluate", run_dir, "--rows", "1").json["step"] == 20
    assert megamask("status", run_dir).json["last_checkpoint"] == NEWEST


@pytest.mark.promise("a tokenizer that disappears during training ends with 64 at the next save")
def test_tokenizer_that_goes_while_a_run_trains_ends_with_64_at_the_next_save(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    kept = save_once(run_dir, step=10, attempt=1)
    fault_points.arm("checkpoint.begun", lambda: shutil.rmtree(tmp_path / "run.tokenizer"))
    try:
        with pytest.raises(DataIntegrityError, match=r"run\.tokenizer has gone since the run began"):
            save_once(run_dir, step=20, attempt=1)
    finally:
        fault_points.disarm()
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["latest", kept.folder.name]
    assert verify_folder(kept.folder).digest == kept.digest


# The run's own records: 65 where they are read for what they contain, nothing where they are hints.


@pytest.mark.promise("a damaged or missing run.json ends with 65, for every byte")
@pytest.mark.parametrize(
    ("verb", "how"),
    # without run.json evaluate has a checkpoint folder before it, whose corpus it asks for: a question of usage
    [*((verb, how) for verb in ("train", "status", "inspect") for how in HOWS), ("evaluate", "flipped")],
)
def test_damaged_run_json_ends_with_65(
    megamask: Any, made: Path, run_dir: Path, tmp_path: Path, verb: str, how: str
) -> None:
    damage(run_dir / "run.json", how)
    arguments: dict[str, list[object]] = {
        "train": ["train", tmp_path / "config.yaml"],
        "status": ["status", run_dir],
        "inspect": ["inspect", run_dir, "--step", "1"],
        "evaluate": ["evaluate", run_dir],
    }
    config = (made / "config.yaml").read_text().replace(f'output_dir: "{made}"', f'output_dir: "{tmp_path}"')
    (tmp_path / "config.yaml").write_text(config)
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    refused(megamask(*arguments[verb]), 65, "run.json")
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


@pytest.mark.promise("a damaged config of an attempt ends with 65 where it is read")
@pytest.mark.parametrize("verb", ["inspect", "evaluate"])
@pytest.mark.parametrize("content", [b"training: [", b"\xff", b"training: {steps: many}", b"traiming: {}", b""])
def test_damaged_config_of_an_attempt_ends_with_65(megamask: Any, run_dir: Path, verb: str, content: bytes) -> None:
    (run_dir / "config" / "attempt-0001.yaml").write_bytes(content)
    arguments = ["inspect", run_dir, "--step", "1"] if verb == "inspect" else ["evaluate", run_dir]
    refused(megamask(*arguments), 65, "attempt-0001.yaml", "which the run wrote")


@pytest.mark.promise("damaged status, claim and journal stop no reader")
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xff", b'{"format": "x"}'])
@pytest.mark.parametrize("name", ["status.json", "attempts/0001/claim.json", "journal/attempt-0001-000.jsonl"])
def test_damaged_hint_of_a_run_stops_no_reader(megamask: Any, run_dir: Path, name: str, content: bytes) -> None:
    (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
    (run_dir / name).write_bytes(content)
    assert megamask("status", run_dir).code == 0
    assert megamask("inspect", run_dir, "--step", "1").code == 0
    assert megamask("evaluate", run_dir, "--rows", "1").code == 0
