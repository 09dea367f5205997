"""`megamask data`: statistics that add up, and documents found in rows and steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megamask.config.schema.data import DataConfig
from megamask.config.schema.training import TrainingConfig
from megamask.data import Corpus
from megamask.data.corpus.documents import read_documents
from megamask.data.corpus.prepare import build
from megamask.data.loader import Loader
from megamask.data.manifest import Manifest
from megamask.data.membership import find_documents, samples_of_row
from megamask.data.reader import SplitReader
from megamask.training.batch_size import batch_size_at, consumed_before, step_of_sample
from megamask_pipelines.cli import main as cli
from support.texts import corpus_config, write_inputs


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    inputs = write_inputs(folder / "inputs")
    named = [*inputs[:2], {"path": inputs[2], "name": "lines", "licence": "CC0", "version": "2"}]
    (folder / "inputs" / "again.txt").write_bytes((folder / "inputs" / "01.txt").read_bytes())
    build(corpus_config(named, folder / "corpus"))
    return folder / "corpus"


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert cli.main([*arguments, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


def test_statistics_add_up_to_the_manifest(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    stats = answer(capsys, "data", "stats", str(corpus), "--html", str(page), "--card")
    manifest = Manifest.load(corpus)
    totals = manifest.content["totals"]
    assert sum(source["tokens"] for source in stats["sources"].values()) == totals["tokens"]
    assert sum(source["text_bytes"] for source in stats["sources"].values()) == totals["text_bytes"]
    assert sum(stats["lengths"].values()) == totals["documents"]
    assert stats["duplicates"]["documents"] == 1
    lines = stats["sources"]["lines"]
    assert lines["bytes_per_token"] == round(lines["text_bytes"] / lines["tokens"], 4)
    tokens = stats["tokens"]
    assert tokens["counted_rows"] == totals["sequences"]
    assert tokens["distinct"] + tokens["unused"] == manifest.vocab_size
    assert "<svg" in page.read_text()
    assert "<script" not in page.read_text()
    card = (corpus / "CARD.md").read_text()
    assert manifest.corpus_id in card
    assert "| lines | 5 |" in card
    assert "| CC0 |  | 2 |" in card
    assert cli.main(["verify", "corpus", str(corpus)]) == 0  # the card is not part of the content


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_rows_of_a_document_are_those_that_name_it(tmp_path: Path, packing: str) -> None:
    corpus = tmp_path / "corpus"
    build(replace(corpus_config(write_inputs(tmp_path / "inputs"), corpus), packing=packing))
    manifest = Manifest.load(corpus)
    tables = [(table["name"], table["documents"]) for table in manifest.content["documents"]["tables"]]
    readers = {split: SplitReader(corpus, manifest, split) for split in manifest.splits}
    for record in read_documents(corpus, tables):
        [found] = find_documents(corpus, number=record.number)
        reader = readers[record.split]
        rows = [row for row in range(reader.num_rows) if record.number in reader.read(row).documents[:, 1]]
        assert list(found.rows) == rows


def test_document_is_found_by_its_text(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = corpus.parent / "inputs" / "01.txt"
    found = answer(capsys, "data", "find", str(corpus), "--text", str(text))["documents"]
    assert [document["input"] for document in found] == ["01.txt", "again.txt"]
    assert cli.main(["data", "find", str(corpus)]) == 2


def test_samples_of_a_row_are_those_that_read_it(corpus: Path) -> None:
    corpora = {"main": str(corpus)}
    with Loader(corpora, DataConfig(corpora=corpora, shuffle_window_blocks=2), 16) as loader:
        count = 2 * loader.num_rows + 7
        rows = [row for _, row in loader.rows(0, count)]
        for row in range(0, loader.num_rows, 5):
            expected = [sample for sample, read in enumerate(rows) if read == row]
            assert list(samples_of_row(loader, "main", row, count)) == expected


def test_export_is_read_by_megatron(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    made = answer(capsys, "data", "export", str(corpus), "--megatron", str(tmp_path / "export"))
    manifest = Manifest.load(corpus)
    assert made["tokens"] == manifest.split("train").num_tokens
    dataset = IndexedDataset(str(tmp_path / "export"))
    rows = Corpus.open(corpus)
    flat = [token for row in rows for token in row.tolist() if token != manifest.pad_token_id]
    assert [token for document in range(len(dataset)) for token in dataset[document].tolist()] == flat
    assert len(dataset) == made["documents"] == manifest.split("train").num_documents
    assert all(dataset[document][-1] == manifest.eod_token_id for document in range(len(dataset)))
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    assert cli.main(["data", "export", str(corpus), "--megatron", str(tmp_path / "export")]) == 2


def test_step_of_a_sample_is_the_inverse_of_the_first_sample_of_a_step() -> None:
    training = TrainingConfig(
        steps=30,
        sequence_length=16,
        global_batch_size=8,
        batch_size_ramp_start=2,
        batch_size_ramp_increment=2,
        batch_size_ramp_samples=40,
    )
    for step in range(1, 30):
        first = consumed_before(step, training)
        samples = range(first, first + batch_size_at(first, training))
        assert {step_of_sample(sample, training) for sample in samples} == {step}
