"""Opening a corpus again in one process: what was computed is kept, and what changed on disk is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megamask.config.schema.data import DataConfig
from megamask.data import block_rows, shard_files
from megamask.data.loader import Loader
from megamask.data.manifest import Manifest
from megamask.errors import DataIntegrityError
from megamask.storage import file_marks
from megamask.storage.hashing import canonical_json
from support.shards import random_documents, write_token_corpus


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus that counts as unchanged for a while."""
    write_token_corpus(tmp_path / "corpus", random_documents(30, seed=1))
    monkeypatch.setattr(file_marks, "_SETTLED_NS", 0)
    return tmp_path / "corpus"


def first_rows(corpus: Path) -> list[list[int]]:
    data = DataConfig(corpora={"main": str(corpus)}, seed=7, shuffle_window_blocks=3)
    with Loader(data.corpora, data, 16) as loader:
        return loader.batch(0, 8, range(8)).tokens.tolist()


@pytest.mark.promise("opening a corpus again in a process parses, compares and sorts nothing again")
def test_corpus_opened_again_does_nothing_twice(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = first_rows(corpus)
    refuse = lambda *_, **__: pytest.fail("done again")  # noqa: E731
    monkeypatch.setattr(Manifest, "load", refuse)
    monkeypatch.setattr(block_rows, "sort_by_words", refuse)
    monkeypatch.setattr(shard_files, "missing", refuse)
    monkeypatch.setattr(shard_files, "index_bytes", refuse)
    assert first_rows(corpus) == expected


def test_manifest_that_changed_is_read_again(corpus: Path) -> None:
    first_rows(corpus)
    content = json.loads((corpus / "manifest.json").read_bytes())
    content["totals"] = {"documents": 0}
    (corpus / "manifest.json").write_bytes(canonical_json(content) + b" ")
    with pytest.raises(DataIntegrityError, match="manifest"):
        first_rows(corpus)


def test_shard_that_was_removed_is_noticed(corpus: Path) -> None:
    first_rows(corpus)
    (corpus / "shards" / "train-000001.idx").unlink()
    with pytest.raises(DataIntegrityError, match=r"train-000001\.idx is missing"):
        first_rows(corpus)


def test_file_that_changed_a_moment_ago_is_never_taken_as_known(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a")
    assert file_marks.settled_mark(tmp_path / "file") is None
    assert file_marks.settled_mark(tmp_path / "none") == (0,)
