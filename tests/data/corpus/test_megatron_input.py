"""Megatron's .bin/.idx as an input: the texts that were exported, or an error that names the document."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megamask.config.schema.corpus import CorpusConfig
from megamask.data.corpus.documents import read_documents
from megamask.data.corpus.prepare import build
from megamask.data.manifest import Manifest
from megamask.data.megatron_files import export_megatron
from megamask.data.tokenizer import CorpusTokenizer
from megamask.errors import DataIntegrityError, UsageError
from support.texts import corpus_config, write_inputs


@pytest.fixture
def source(tmp_path: Path) -> CorpusConfig:
    config = replace(corpus_config(write_inputs(tmp_path / "inputs"), tmp_path / "source"), validation_fraction=0.0)
    build(config)
    return config


def imported(source: CorpusConfig, bin_file: Path, **changes: str) -> CorpusConfig:
    entry = {"path": str(bin_file), "format": "megatron", "tokenizer": f"{source.output_dir}/tokenizer"} | changes
    tokenizer = replace(source.tokenizer, vocab_size=None, path=f"{source.output_dir}/tokenizer/tokenizer.json")
    return replace(source, inputs=[entry], output_dir=str(bin_file.with_name("again")), tokenizer=tokenizer)


def texts_of(corpus: str) -> list[tuple[int, str]]:
    content = Manifest.load(corpus).content
    tables = [(table["name"], table["documents"]) for table in content["documents"]["tables"]]
    return [(record.tokens, record.text_sha256) for record in read_documents(corpus, tables)]


@pytest.mark.promise("Megatron's .bin/.idx is an input: an exported corpus comes back with its texts and rows")
def test_exported_corpus_is_imported_with_the_same_texts_and_rows(source: CorpusConfig, tmp_path: Path) -> None:
    export_megatron(Path(source.output_dir), tmp_path / "export")
    config = imported(source, tmp_path / "export.bin")
    build(config)
    assert texts_of(config.output_dir) == texts_of(source.output_dir)
    first, again = (Manifest.load(folder) for folder in (source.output_dir, config.output_dir))
    assert again.source_digest("train") == first.source_digest("train")
    assert again.content["inputs"][0]["format"] == "megatron"


def test_pair_of_megatrons_own_builder_is_read_with_documents_of_several_sequences(
    source: CorpusConfig, tmp_path: Path
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    tokenizer = CorpusTokenizer.load(f"{source.output_dir}/tokenizer")
    builder = IndexedDatasetBuilder(str(tmp_path / "built.bin"), dtype=np.int32)
    texts = ["one text, ", "its second part", "another document"]
    ids = [tokenizer.encode(text) for text in texts]
    builder.add_item(torch.tensor(ids[0]))
    builder.add_item(torch.tensor([*ids[1], tokenizer.eod_token_id]))
    builder.end_document()
    builder.add_item(torch.tensor(ids[2]))  # without an end-of-document id
    builder.end_document()
    builder.finalize(str(tmp_path / "built.idx"))
    config = imported(source, tmp_path / "built.bin")
    build(config)
    expected = [tokenizer.encode(texts[0] + texts[1]), tokenizer.encode(texts[2])]
    assert [count for count, _ in texts_of(config.output_dir)] == [len(document) + 1 for document in expected]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", "beyond the end of the .bin file"),
        ("mask", "has the special token"),
        ("large", "outside the vocabulary"),
        ("magic", "not an index of Megatron's format"),
        ("short", "its header gives"),
    ],
)
def test_damaged_pair_is_named(source: CorpusConfig, tmp_path: Path, damage: str, message: str) -> None:
    export_megatron(Path(source.output_dir), tmp_path / "export")
    ids, index = tmp_path / "export.bin", tmp_path / "export.idx"
    mask = CorpusTokenizer.load(f"{source.output_dir}/tokenizer").mask_token_id
    changed = {
        "cut": (ids, lambda data: data[:-2]),
        "mask": (ids, lambda data: struct.pack("<H", mask) + data[2:]),
        "large": (ids, lambda data: b"\xff\xff" + data[2:]),
        "magic": (index, lambda data: b"X" + data[1:]),
        "short": (index, lambda data: data[:-8]),
    }
    path, change = changed[damage]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataIntegrityError, match=message):
        build(imported(source, ids))


def test_format_without_a_tokenizer_is_refused(source: CorpusConfig, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"")
    entry = {"path": str(tmp_path / "x.bin"), "format": "megatron"}
    with pytest.raises(UsageError, match="needs the tokenizer of its ids"):
        build(replace(source, inputs=[entry], output_dir=str(tmp_path / "again")))
    with pytest.raises(UsageError, match="does not exist"):
        build(imported(source, tmp_path / "x.bin", tokenizer=str(tmp_path / "none")))
    with pytest.raises(DataIntegrityError, match=r"x\.idx is missing"):
        build(imported(source, tmp_path / "x.bin"))
