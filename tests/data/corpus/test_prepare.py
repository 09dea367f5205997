from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamask.config.schema.corpus import CorpusConfig, TokenizerConfig
from megamask.data.corpus import encode, scan
from megamask.data.corpus.documents import read_documents
from megamask.data.corpus.prepare import PrepareReport, build
from megamask.data.index import ShardIndex
from megamask.data.manifest import Manifest
from megamask.data.tokenizer import CorpusTokenizer
from megamask.errors import DataIntegrityError, ExitCode, StorageError, UsageError
from megamask.storage.hashing import sha256_bytes
from support.texts import SPECIAL_TEXT, corpus_config, tree_of, write_inputs


def prepared(folder: Path, **changes: object) -> tuple[PrepareReport, Path]:
    inputs = write_inputs(folder / "inputs")
    report = build(corpus_config(inputs, folder / "corpus", **changes))
    return report, folder / "corpus"


def read_split(corpus: Path, split: str) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """Rows [n, L] and (row, start, number) of a split, read with NumPy and the index alone."""
    manifest = Manifest.load(corpus)
    rows, entries, first = [], [], 0
    for shard in manifest.split(split).shards:
        data = (corpus / shard.name).read_bytes()
        index = ShardIndex.unpack((corpus / shard.index_name).read_bytes(), name=shard.index_name)
        for block in index.blocks:
            tokens = data[block["tokens_offset"] :][: block["tokens_bytes"]]
            docs = data[block["docs_offset"] :][: block["docs_bytes"]]
            rows.append(np.frombuffer(tokens, manifest.dtype).reshape(-1, manifest.sequence_length))
            found = np.frombuffer(docs, "<i8").reshape(-1, 3).tolist()
            entries += [(first + row, start, number) for row, start, number in found]
            first += len(rows[-1])
    return np.concatenate(rows), entries


def documents_of(corpus: Path) -> dict[int, str]:
    """Every document's text, decoded from the rows of both splits."""
    manifest = Manifest.load(corpus)
    tokenizer = CorpusTokenizer.load(corpus / "tokenizer")
    texts: dict[int, str] = {}
    for split in manifest.splits:
        rows, entries = read_split(corpus, split)
        flat = rows.reshape(-1)
        eligible = flat[flat != manifest.pad_token_id].tolist()
        numbers: list[int] = []
        for _, _, number in entries:
            if not numbers or numbers[-1] != number:
                numbers.append(number)
        start = 0
        for number in numbers:
            end = eligible.index(manifest.eod_token_id, start)
            texts[number] = tokenizer.decode(eligible[start:end])
            start = end + 1
        assert start == len(eligible)
    return texts


def assert_nothing_is_left(folder: Path) -> None:
    assert [path.name for path in folder.iterdir() if path.name != "inputs"] == []


# --- what a corpus holds


@pytest.mark.promise("a corpus decodes to its documents exactly")
def test_corpus_decodes_to_its_documents_exactly(tmp_path: Path) -> None:
    _, corpus = prepared(tmp_path)
    manifest = Manifest.load(corpus)
    tables = [(table["name"], table["documents"]) for table in manifest.content["documents"]["tables"]]
    texts = documents_of(corpus)
    for record in read_documents(corpus, tables):
        raw = (tmp_path / "inputs" / record.input).read_bytes()
        assert sha256_bytes(raw) == record.input_sha256
        part = raw[record.offset : record.offset + record.bytes]
        text = json.loads(part)["text"] if record.input.endswith(".jsonl") else part.decode()
        assert texts.pop(record.number) == text
        assert sha256_bytes(text.encode()) == record.text_sha256
    assert texts == {}


@settings(max_examples=15)
@given(texts=st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"])), min_size=2, max_size=6))
def test_corpus_of_any_text_decodes_to_it(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("any")
    lines = [json.dumps({"text": text}) for text in ["never empty", *texts]]
    (folder / "a.jsonl").write_text("\n".join(lines))
    config = corpus_config([f"{folder}/a.jsonl"], folder / "corpus", tokenizer=TokenizerConfig(vocab_size=259))
    build(config)
    assert documents_of(folder / "corpus") == dict(enumerate(["never empty", *texts]))


def test_report_and_manifest_count_what_is_there(tmp_path: Path) -> None:
    report, corpus = prepared(tmp_path)
    manifest = Manifest.load(corpus)
    assert report.corpus_id == manifest.corpus_id == sha256_bytes((corpus / "manifest.json").read_bytes())
    assert (report.reused, report.output_dir, report.documents) == (False, str(corpus), 20)
    totals = {"tokens": 0, "padding": 0, "sequences": 0, "shards": 0, "bytes": 0, "documents": 0}
    for name, split in manifest.splits.items():
        rows, entries = read_split(corpus, name)
        padding = rows == manifest.pad_token_id
        assert split.num_padding == padding.sum() == padding[-1].sum()
        assert (split.num_tokens, split.num_rows) == ((~padding).sum(), len(rows))
        assert split.num_documents == len({number for _, _, number in entries})
        totals["tokens"] += split.num_tokens
        totals["sequences"] += split.num_rows
        totals["shards"] += len(split.shards)
        totals["bytes"] += split.text_bytes
        totals["documents"] += split.num_documents
    for name in ("tokens", "sequences", "shards", "bytes", "documents"):
        assert getattr(report, name) == totals[name]
    assert len(manifest.split("train").shards) > 2


def test_special_strings_of_the_text_become_no_special_ids(tmp_path: Path) -> None:
    _, corpus = prepared(tmp_path)
    manifest = Manifest.load(corpus)
    used: set[int] = set()
    for name, split in manifest.splits.items():
        tokens = read_split(corpus, name)[0].reshape(-1)
        used |= set(tokens[tokens != manifest.pad_token_id].tolist())
        assert (tokens == manifest.eod_token_id).sum() == split.num_documents
    assert SPECIAL_TEXT * 3 in documents_of(corpus).values()
    assert manifest.mask_token_id not in used
    assert manifest.content["unused_ids"] == sorted(set(range(manifest.vocab_size)) - used)
    assert {manifest.mask_token_id, manifest.pad_token_id} <= set(manifest.content["unused_ids"])


@pytest.mark.promise("the manifest contains no path, host or time")
def test_manifest_holds_no_path_host_or_time_and_provenance_does(tmp_path: Path) -> None:
    report, corpus = prepared(tmp_path, licence="CC0-1.0", origin="a test")
    manifest = (corpus / "manifest.json").read_text()
    assert str(tmp_path) not in manifest
    assert "CC0-1.0" not in manifest
    record = json.loads((corpus / "provenance.json").read_text())
    assert (record["corpus_id"], record["licence"], record["origin"]) == (report.corpus_id, "CC0-1.0", "a test")
    assert {Path(file["path"]).is_file() for file in record["files"]} == {True}
    assert set(record["libraries"]) >= {"tokenizers", "tiktoken", "pyarrow"}


@pytest.mark.promise("the same inputs and options give the same bytes and corpus id")
def test_corpus_is_byte_identical_when_prepared_again_or_from_moved_inputs(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "inputs")
    build(corpus_config(inputs, tmp_path / "one"))
    build(corpus_config(inputs, tmp_path / "two"))
    shutil.copytree(tmp_path / "inputs", tmp_path / "moved" / "elsewhere")
    moved = [pattern.replace(str(tmp_path / "inputs"), str(tmp_path / "moved" / "elsewhere")) for pattern in inputs]
    build(corpus_config(list(reversed(moved)), tmp_path / "three"))
    first, second, third = (tree_of(tmp_path / name) for name in ("one", "two", "three"))
    for tree in (first, second, third):
        del tree["provenance.json"]  # paths and time
    assert first == second == third


def test_loaded_tokenizer_makes_the_corpus_of_the_trained_one(tmp_path: Path) -> None:
    report, corpus = prepared(tmp_path)
    artefact = tmp_path / "inputs.tokenizer.json"
    shutil.copy(corpus / "tokenizer" / "tokenizer.json", artefact)
    inputs = json.loads((corpus / "provenance.json").read_text())["inputs"]
    config = corpus_config(inputs, tmp_path / "second", tokenizer=TokenizerConfig(path=str(artefact)))
    second = build(config)
    assert second.corpus_id != report.corpus_id, "the options differ"
    assert Manifest.load(tmp_path / "second").splits == Manifest.load(corpus).splits
    assert Manifest.load(tmp_path / "second").tokenizer_digest == Manifest.load(corpus).tokenizer_digest


def test_corpus_without_validation_has_the_train_split_only(tmp_path: Path) -> None:
    _, corpus = prepared(tmp_path, validation_fraction=0.0)
    assert list(Manifest.load(corpus).splits) == ["train"]
    assert not list((corpus / "shards").glob("validation*"))


@pytest.mark.promise("the tokenizer never sees validation text")
def test_tokenizer_never_sees_validation_text_nor_more_than_training_bytes(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "inputs")
    config = corpus_config(inputs, tmp_path / "corpus")
    scanned = scan.scan(scan_files(config), jsonl_text_key="text", validation_fraction="0.25", progress=lambda *_: None)
    train = [text for number, _, text in scanned.texts(lambda _: None) if scanned.documents.split_of(number) == "train"]
    assert len(train) < len(scanned.documents)
    assert list(scanned.training_texts(10**9, lambda *_: None)) == train
    for limit in (1, 50, 777):
        texts = list(scanned.training_texts(limit, lambda *_: None))
        assert "".join(train).startswith("".join(texts))
        assert limit - 3 <= len("".join(texts).encode()) <= limit


def scan_files(config: CorpusConfig) -> list[scan.InputFile]:
    from megamask.data.corpus.inputs import find_inputs

    return find_inputs(config.inputs)


def test_vocabulary_above_16_bits_is_stored_in_32(tmp_path: Path) -> None:
    _, small = prepared(tmp_path / "small")
    artefact = json.loads((small / "tokenizer" / "tokenizer.json").read_text())
    artefact["added_tokens"] = []
    vocab = artefact["model"]["vocab"]
    letters = sorted(entry for entry in vocab if len(entry) == 1)
    for pair in (first + second for first in letters for second in letters):
        vocab.setdefault(pair, len(vocab))  # an entry that no merge reaches
    path = tmp_path / "large.json"
    path.write_text(json.dumps(artefact))
    inputs = write_inputs(tmp_path / "inputs")
    build(corpus_config(inputs, tmp_path / "corpus", tokenizer=TokenizerConfig(path=str(path))))
    manifest = Manifest.load(tmp_path / "corpus")
    assert manifest.vocab_size > 65536
    assert manifest.dtype.str == "<u4"
    assert documents_of(tmp_path / "corpus") == documents_of(small)


def test_progress_ends_at_the_whole_of_every_phase(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "inputs")
    seen: dict[str, list[tuple[int, int]]] = {}
    documents: dict[str, int] = {}

    def note(phase: str, num_documents: int, done: int, total: int | None) -> None:
        assert total is not None
        seen.setdefault(phase, []).append((done, total))
        documents[phase] = num_documents

    report = build(corpus_config(inputs, tmp_path / "corpus"), note)
    assert 0 < documents["reading text for the tokenizer"] < documents["encoding"] < report.documents + 1
    assert list(seen) == ["reading the inputs", "reading text for the tokenizer", "encoding"]
    for steps in seen.values():
        assert steps[0][0] == 0
        assert steps[-1][0] == steps[-1][1] > 0
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)


# --- what is there already


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


# --- what is refused


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


# --- what happens when the machine does not play along

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


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    (tmp_path / "inputs").mkdir()
    lines = [json.dumps({"text": f"{number} " + "a b c d e f g h " * 256}) for number in range(600)]
    (tmp_path / "inputs" / "a.jsonl").write_text("\n".join(lines))
    config = corpus_config([f"{tmp_path}/inputs/a.jsonl"], tmp_path / "corpus", sequence_length=1024)
    prepared(tmp_path / "before")  # so that no module is imported for the first time below
    tracemalloc.start()
    try:
        report = build(replace(config, tokenizer=TokenizerConfig(vocab_size=259, training_bytes=1000)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report.bytes > 2_400_000
    assert peak < 1_200_000
