"""A preparation is complete or leaves nothing: existing output, unusable input, interruptions, full disks."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megamask.config.schema.corpus import TokenizerConfig
from megamask.data.corpus import encode
from megamask.data.corpus.prepare import build
from megamask.data.manifest import Manifest
from megamask.data.tokenizer import CorpusTokenizer
from megamask.errors import DataIntegrityError, ExitCode, StorageError, UsageError
from support.preparing import assert_nothing_is_left, prepared
from support.texts import corpus_config, tree_of, write_inputs


def test_same_corpus_is_reused_without_being_touched(tmp_path: Path) -> None:
    report, corpus = prepared(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    inputs = json.loads((corpus / "provenance.json").read_text())["inputs"]
    again = build(corpus_config(inputs, corpus))
    assert again == replace(report, reused=True)
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"sequence_length": 32}, "sequence_length"),
        ({"validation_fraction": 0.5}, "options"),
        ({"rows_per_block": 5}, "options"),
        ({"tokenizer": TokenizerConfig(vocab_size=280)}, "options"),
    ],
)
def test_other_corpus_in_the_output_is_refused_and_not_touched(
    changes: dict[str, object], difference: str, tmp_path: Path
) -> None:
    _, corpus = prepared(tmp_path)
    before = tree_of(tmp_path)
    inputs = json.loads((corpus / "provenance.json").read_text())["inputs"]
    with pytest.raises(UsageError, match=f"these differ: {difference}"):
        build(corpus_config(inputs, corpus, **changes))
    (tmp_path / "inputs" / "00.txt").write_text("other text")
    with pytest.raises(UsageError, match="these differ: inputs"):
        build(corpus_config(inputs, corpus))
    (tmp_path / "inputs" / "00.txt").unlink()
    assert tree_of(tmp_path) == before


def test_output_that_is_no_corpus_is_refused_and_not_touched(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "inputs")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "precious.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = tree_of(tmp_path)
    for name in ("corpus", "file"):
        with pytest.raises(UsageError, match="exists and is not a corpus"):
            build(corpus_config(inputs, tmp_path / name))
    with pytest.raises(UsageError, match="not a folder"):
        build(corpus_config(inputs, tmp_path / "file" / "below"))
    assert tree_of(tmp_path) == before


def test_empty_output_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    report, corpus = prepared(tmp_path)
    assert Manifest.load(corpus).corpus_id == report.corpus_id


def test_same_corpus_with_a_missing_or_truncated_shard_is_a_data_error(tmp_path: Path) -> None:
    _, corpus = prepared(tmp_path)
    inputs = json.loads((corpus / "provenance.json").read_text())["inputs"]
    shard = corpus / "shards" / "train-000001.tar"
    os.truncate(shard, 512)
    with pytest.raises(DataIntegrityError, match=r"train-000001\.tar has 512 bytes"):
        build(corpus_config(inputs, corpus))
    shard.unlink()
    with pytest.raises(DataIntegrityError, match=r"train-000001\.tar is missing"):
        build(corpus_config(inputs, corpus))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": TokenizerConfig()}, "neither of vocab_size and path"),
        ({"tokenizer": TokenizerConfig(vocab_size=300, path="x.json")}, "both of vocab_size and path"),
        ({"tokenizer": TokenizerConfig(path="gone.json")}, "cannot be read"),
        ({"tokenizer": TokenizerConfig(vocab_size=300, mask_token="<|pad|>")}, "three different strings"),
        ({"inputs": ["gone/*.txt"]}, "matches no file"),
    ],
)
def test_config_that_cannot_be_done_is_refused_and_leaves_nothing(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        build(replace(corpus_config(write_inputs(tmp_path / "inputs"), tmp_path / "corpus"), **changes))
    assert caught.value.exit_code == ExitCode.USAGE
    assert_nothing_is_left(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "error", "message"),
    [
        ("a.txt", b"", UsageError, "the corpus is empty"),
        ("a.jsonl", b"\n \n", UsageError, "the corpus is empty"),
        ("a.txt", b"only one", UsageError, "single document"),
        ("a.txt", b"bad \xff", DataIntegrityError, "byte 4"),
        ("a.jsonl", b'{"text": "x"}\n{', DataIntegrityError, r"a\.jsonl:2"),
    ],
)
def test_input_that_cannot_be_used_is_refused_and_leaves_nothing(
    name: str, data: bytes, error: type[Exception], message: str, tmp_path: Path
) -> None:
    (tmp_path / "inputs").mkdir()
    (tmp_path / "inputs" / name).write_bytes(data)
    with pytest.raises(error, match=message):
        build(corpus_config([f"{tmp_path}/inputs/*"], tmp_path / "new" / "deep" / "corpus"))
    assert_nothing_is_left(tmp_path)


def test_input_that_changes_meanwhile_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "inputs")

    def meddle(phase: str, _documents: int, done: int, total: int | None) -> None:
        if phase == "encoding" and done == 0:
            (tmp_path / "inputs" / "11.txt").write_text("changed")

    with pytest.raises(DataIntegrityError, match=r"11\.txt changed while"):
        build(corpus_config(inputs, tmp_path / "new" / "corpus"), meddle)
    assert_nothing_is_left(tmp_path)


def test_input_that_changes_between_its_documents_is_refused(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "inputs")

    def meddle(phase: str, _documents: int, done: int, total: int | None) -> None:
        if phase == "encoding" and done == 0:
            with (tmp_path / "inputs" / "lines.jsonl").open("a") as file:
                file.write("\n")

    with pytest.raises(DataIntegrityError, match=r"lines\.jsonl changed while"):
        build(corpus_config(inputs, tmp_path / "corpus"), meddle)
    assert_nothing_is_left(tmp_path)


def test_tokenizer_that_loses_text_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = CorpusTokenizer.encode_array
    monkeypatch.setattr(CorpusTokenizer, "encode_array", lambda self, text: good(self, text)[:-1])
    monkeypatch.setattr(CorpusTokenizer, "check_text", lambda self, text: None)
    with pytest.raises(UsageError, match="lost part of it"):
        prepared(tmp_path)
    assert_nothing_is_left(tmp_path)


def test_parity_gate_sees_a_document_of_every_kind_of_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    monkeypatch.setattr(CorpusTokenizer, "check_text", lambda self, text: checked.append(text))
    monkeypatch.setattr(encode, "_PARITY_FIRST", 1)
    prepared(tmp_path)
    assert any(text.startswith("line 0 of the jsonl") for text in checked)
    assert any(text.startswith("Document 0 says") for text in checked), "the .md file"
    assert any(text.startswith("Document 1 says") for text in checked), "the .txt file"
    assert "\x00\x01\x7f" in checked, "the nasty texts"


def test_second_live_prepare_of_one_target_is_refused(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "inputs")
    with (tmp_path / ".corpus.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another process is preparing"):
            build(corpus_config(inputs, tmp_path / "corpus"))
    assert not (tmp_path / "corpus").exists()
    build(corpus_config(inputs, tmp_path / "corpus"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "inputs"]


def test_leftovers_of_an_interrupted_prepare_are_swept(tmp_path: Path) -> None:
    (tmp_path / ".corpus.building" / "shards").mkdir(parents=True)
    (tmp_path / ".corpus.building" / "shards" / "train-000000.tar").write_text("half")
    (tmp_path / ".corpus.building" / "junk").write_text("half")
    (tmp_path / ".corpus.lock").touch()
    _, corpus = prepared(tmp_path)
    assert not (corpus / "junk").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "inputs"]


PROGRAM = """
import os, resource, signal, sys
from pathlib import Path
from support.texts import corpus_config
from megamask.data.corpus.prepare import build

folder, action, place = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if action == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (place, place))
calls = 0
def watch(*_):
    global calls
    calls += 1
    if action == "kill" and calls == place:
        os.kill(os.getpid(), signal.SIGKILL)
try:
    build(corpus_config([f"{folder}/inputs/**/*.*"], folder / "corpus"), watch)
except Exception as error:
    print(error)
    sys.exit(int(error.exit_code))
"""


def run(folder: Path, action: str, place: int) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), action, str(place)],
        capture_output=True,
        text=True,
        env=environment,
    )


@pytest.mark.promise("a killed preparation publishes no corpus, and the next one completes it")
def test_killed_prepare_shows_no_corpus_and_the_next_one_makes_it_whole(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "inputs")
    build(corpus_config(inputs, tmp_path / "expected"))
    for place in (5, 30, 45, 55):  # scanning, training, encoding, near the end
        killed = run(tmp_path, "kill", place)
        assert killed.returncode == -signal.SIGKILL
        assert not (tmp_path / "corpus").exists()
    assert (tmp_path / ".corpus.building").is_dir(), "the test kills before anything is written"
    assert run(tmp_path, "none", 0).returncode == 0
    trees = [tree_of(tmp_path / name) for name in ("corpus", "expected")]
    for tree in trees:
        del tree["provenance.json"]
    assert trees[0] == trees[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "expected", "inputs"]


@pytest.mark.parametrize("limit", [100, 3000, 10_000])
def test_file_size_limit_is_a_storage_error_and_leaves_nothing(limit: int, tmp_path: Path) -> None:
    write_inputs(tmp_path / "inputs")
    done = run(tmp_path, "limit", limit)
    assert (done.returncode, done.stderr) == (ExitCode.STORAGE, "")
    assert "the file-size limit is reached" in done.stdout
    assert_nothing_is_left(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_output_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(StorageError, match="permission denied"):
        build(corpus_config(write_inputs(tmp_path / "inputs"), tmp_path / "closed" / "corpus"))


def test_failing_flush_is_a_storage_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    inputs = write_inputs(tmp_path / "inputs")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match="the disk is full") as caught:
        build(corpus_config(inputs, tmp_path / "new" / "corpus"))
    assert caught.value.exit_code == ExitCode.STORAGE
    monkeypatch.undo()
    assert_nothing_is_left(tmp_path)
