"""Best-fit packing: no document that fits into a row is cut, nothing is lost, no two rows fit into one."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.config.schema.data import DataConfig
from megamask.data.corpus.best_fit import BestFitPacker
from megamask.data.corpus.pack import token_dtype
from megamask.data.corpus.prepare import build, merge, run_task
from megamask.data.loader import Loader
from megamask.data.manifest import Manifest
from megamask.data.stats import corpus_stats
from megamask.data.verify import verify_corpus
from megamask.errors import DataIntegrityError
from megamask.storage.hashing import canonical_json
from support.texts import corpus_config, tree_of, write_inputs

EOD, PAD = 97, 98
DOCUMENTS = st.lists(st.lists(st.integers(0, 96), max_size=40), min_size=1, max_size=30)
SHAPES = {"documents": DOCUMENTS, "length": st.integers(1, 20), "rows": st.integers(1, 5), "window": st.integers(1, 99)}


def pack(
    documents: list[list[int]], length: int, rows: int, window: int
) -> tuple[np.ndarray, list[list[tuple[int, int]]]]:
    """Rows [n, L], and (start, number) of what each row lists; checks the shape of the blocks."""
    packer = BestFitPacker(
        sequence_length=length, rows_per_block=rows, dtype=token_dtype(100), pad_token_id=PAD, window_tokens=window
    )
    groups = []
    for number, document in enumerate(documents):
        half = len(document) // 2  # two segments, the second an answer, as of a conversation
        segments = [(number, np.array(document[:half])), (-number - 1, np.array([*document[half:], EOD]))]
        groups += packer.add_document(number, segments)
    groups += packer.finish()
    assert all(group.tokens.shape == (rows, length) for group in groups[:-1])
    tokens = np.concatenate([group.tokens for group in groups])
    listed: list[list[tuple[int, int]]] = [[] for _ in tokens]
    for number, group in enumerate(groups):
        assert group.docs.tolist() == sorted(group.docs.tolist())
        for row, start, document in group.docs.tolist():
            listed[number * rows + row].append((start, document))
    eligible = sum(len(document) + 1 for document in documents)
    assert (packer.num_tokens, packer.num_padding) == (eligible, tokens.size - eligible)
    return tokens, listed


def pieces_of(tokens: np.ndarray, listed: list[list[tuple[int, int]]]) -> dict[int, list[tuple[int, list[int]]]]:
    """By document, (row, ids) of the segments that rows list, in the order of the rows; padding left out."""
    found: dict[int, list[tuple[int, list[int]]]] = {}
    for row, entries in enumerate(listed):
        for (start, number), (stop, _) in itertools.pairwise([*entries, (tokens.shape[1], 0)]):
            ids = [token for token in tokens[row, start:stop].tolist() if token != PAD]
            found.setdefault(number if number >= 0 else -number - 1, []).append((row, ids))
    return found


@given(**SHAPES)
def test_documents_that_fit_are_in_one_row_and_no_token_is_lost(
    documents: list[list[int]], length: int, rows: int, window: int
) -> None:
    pieces = pieces_of(*pack(documents, length, rows, window))
    assert sorted(pieces) == list(range(len(documents)))
    for number, document in enumerate(documents):
        parts = pieces[number]
        if len(document) < length:
            assert len({row for row, _ in parts}) == 1
            assert [token for _, ids in parts for token in ids] == [*document, EOD]
        assert len({row for row, _ in parts}) == -(-(len(document) + 1) // length)
        assert sorted(token for _, ids in parts for token in ids) == sorted([*document, EOD])


@given(documents=DOCUMENTS, length=st.integers(1, 20))
def test_no_two_rows_of_a_window_fit_into_one(documents: list[list[int]], length: int) -> None:
    # with one window: best fit begins a row only for a piece that no row has room for
    tokens, _ = pack(documents, length, 4, 10_000)
    filled = sorted((tokens != PAD).sum(axis=1).tolist())
    assert len(filled) == 1 or filled[0] + filled[1] > length


def test_longest_pieces_are_placed_first_into_the_fullest_row_that_holds_them() -> None:
    documents = [[1] * 3, [2] * 8, [3] * 5, [4], [5] * 6]  # 4, 9, 6, 2 and 7 tokens with the end of document
    tokens, _ = pack(documents, 10, 4, 10_000)
    expected = [[1] * 3 + [EOD] + [3] * 5 + [EOD], [2] * 8 + [EOD, PAD], [4, EOD] + [5] * 6 + [EOD, PAD]]
    assert tokens.tolist() == expected


@pytest.mark.promise("best-fit packing cuts no document that fits into a row, and verify corpus checks the layout")
def test_best_fit_corpus_verifies_and_its_statistics_are_true(tmp_path: Path) -> None:
    config = replace(corpus_config(write_inputs(tmp_path / "inputs"), tmp_path / "corpus"), packing="best_fit")
    build(config)
    verify_corpus(tmp_path / "corpus")
    content = Manifest.load(tmp_path / "corpus").content
    assert content["packer"] == {"name": "best-fit", "version": 1}
    stats = corpus_stats(tmp_path / "corpus")
    counts = content["packing"]["train"]
    assert counts["cut_documents"] == stats["splits"]["train"]["split_documents"]
    assert sum(counts["lengths"].values()) == content["splits"]["train"]["documents"]
    with Loader({"main": str(tmp_path / "corpus")}, DataConfig(corpora={}), config.sequence_length) as loader:
        batch = loader.batch(0, loader.num_rows, range(loader.num_rows))
        assert int(batch.is_eligible.sum()) == content["splits"]["train"]["tokens"]
    packed = replace(config, output_dir=str(tmp_path / "tasks"))
    for task in range(2):
        run_task(packed, task, 2)
    merge(packed)
    trees = [tree_of(tmp_path / name) for name in ("corpus", "tasks")]
    assert all(tree.pop("provenance.json") for tree in trees)
    assert trees[0] == trees[1]


@pytest.mark.parametrize("what", ["statistics", "packer"])
def test_wrong_packing_of_a_manifest_is_found(tmp_path: Path, what: str) -> None:
    config = replace(corpus_config(write_inputs(tmp_path / "inputs"), tmp_path / "corpus"), packing="best_fit")
    build(config)
    path = tmp_path / "corpus" / "manifest.json"
    content = json.loads(path.read_bytes())
    if what == "statistics":
        content["packing"]["train"]["pieces"] += 1
    else:
        content["packer"] = {"name": "concatenate-and-cut", "version": 1}
    path.write_bytes(canonical_json(content))
    (tmp_path / "corpus" / "provenance.json").unlink()
    message = "packing is not" if what == "statistics" else "padding where a document belongs"
    with pytest.raises(DataIntegrityError, match=message):
        verify_corpus(tmp_path / "corpus")


def test_default_packing_leaves_no_mark_in_the_manifest(tmp_path: Path) -> None:
    build(corpus_config(write_inputs(tmp_path / "inputs"), tmp_path / "corpus"))
    content = Manifest.load(tmp_path / "corpus").content
    assert "packing" not in content
    assert "packing" not in content["options"]
