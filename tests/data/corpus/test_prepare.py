"""A prepared corpus is its documents exactly, byte for byte the same each time, with true counts."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamask.config.schema.corpus import CorpusConfig, TokenizerConfig
from megamask.data.corpus import scan
from megamask.data.corpus.documents import read_documents
from megamask.data.corpus.prepare import build
from megamask.data.index import ShardIndex
from megamask.data.manifest import Manifest
from megamask.data.tokenizer import CorpusTokenizer
from megamask.storage.hashing import sha256_bytes
from support.preparing import prepared
from support.texts import SPECIAL_TEXT, corpus_config, tree_of, write_inputs


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
    scanned = scan.scan(scan_files(config), config, lambda *_: None)
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
