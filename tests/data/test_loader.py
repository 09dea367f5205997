"""Batches: the right rows for every caller, the same with and without prefetch, and digests that see a wrong row."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megamask.config.schema.data import DataConfig
from megamask.data.content import add_content, content_digest, content_hash, documents_checksum, tokens_checksum
from megamask.data.index import ShardIndex
from megamask.data.loader import Batch, Loader
from megamask.data.reader import SplitReader
from megamask.data.row_batch import RowBatch
from megamask.errors import DataIntegrityError, ExitCode, UsageError
from megamask.storage.hashing import hash_of, key_of, sha256_file
from support.order_oracle import draw_rows
from support.shards import flip_bit, packed_documents, packed_rows, random_documents, write_token_corpus

DOCUMENTS = random_documents(30, seed=1)
ROWS = packed_rows(DOCUMENTS, sequence_length=16, eod=61, pad=62)
PAIRS = packed_documents(DOCUMENTS, sequence_length=16)


@pytest.fixture(scope="module")
def shared_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loader") / "corpus"
    write_token_corpus(folder, DOCUMENTS, validation=random_documents(3, seed=2))
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_token_corpus(tmp_path / "corpus", DOCUMENTS)
    return tmp_path / "corpus"


@pytest.fixture
def loader(shared_corpus: Path) -> Iterator[Loader]:
    with open_loader(shared_corpus) as opened:
        yield opened


def open_loader(folder: Path, *, length: int = 16, split: str = "train", seed: int = 7, window: int = 3) -> Loader:
    data = DataConfig(corpora={"main": str(folder)}, seed=seed, shuffle_window_blocks=window)
    return Loader(data.corpora, data, length, split)


def source_digest(folder: Path, split: str = "train") -> str:
    return hash_of(*[sha256_file(path) for path in sorted((folder / "shards").glob(f"{split}-*.tar"))])


def same(first: Batch, second: Batch) -> bool:
    tensors = ("tokens", "is_eligible", "sample_index", "batch_position")
    return (
        all(torch.equal(getattr(first, name), getattr(second, name)) for name in tensors)
        and first.rows == second.rows
        and first.content_sum == second.content_sum
    )


def joined(batches: list[Batch]) -> dict[int, tuple[list[int], int]]:
    return {
        int(place): (tokens.tolist(), int(index))
        for batch in batches
        for place, tokens, index in zip(batch.batch_position, batch.tokens, batch.sample_index, strict=True)
    }


def test_batch_holds_the_rows_that_the_order_law_names(shared_corpus: Path, loader: Loader) -> None:
    key = key_of(hash_of(7, source_digest(shared_corpus), "train"))
    blocks = [4] * (len(ROWS) // 4) + ([len(ROWS) % 4] if len(ROWS) % 4 else [])
    first = len(ROWS) - 5  # crosses into the second epoch
    expected = draw_rows(blocks, first, 12, key, 3)
    batch = loader.batch(first, 12, range(12))
    assert batch.rows == [("main", row) for row in expected]
    assert batch.tokens.tolist() == [ROWS[row] for row in expected]
    assert batch.sample_index.tolist() == list(range(first, first + 12))
    assert batch.batch_position.tolist() == list(range(12))
    assert (batch.tokens.dtype, batch.is_eligible.dtype) == (torch.uint16, torch.bool)  # as stored


def test_content_sum_follows_its_definition(shared_corpus: Path, loader: Loader) -> None:
    batch = loader.batch(20, 6, range(6))
    digest = source_digest(shared_corpus)
    parts = [
        content_hash(
            20 + place,
            digest,
            row,
            tokens_checksum(np.array(ROWS[row], dtype="<u2")),
            documents_checksum(np.array(PAIRS[row])),
        )
        for place, (_, row) in enumerate(batch.rows)
    ]
    assert batch.content_sum == add_content(*parts)


def test_padding_is_not_eligible_and_everything_else_is(loader: Loader) -> None:
    batch = loader.batch(0, loader.num_rows, range(loader.num_rows))
    assert int((~batch.is_eligible).sum()) == -sum(len(text) + 1 for text in DOCUMENTS) % 16 > 0
    assert torch.equal(batch.is_eligible, batch.tokens != 62)


@pytest.mark.promise("a global batch is the same for every way of sharing it among ranks")
@given(first=st.integers(0, 200), size=st.integers(1, 24), ranks=st.integers(1, 6), shuffle=st.randoms())
def test_global_batch_is_the_same_however_ranks_share_it(
    shared_corpus: Path, first: int, size: int, ranks: int, shuffle: object
) -> None:
    places = list(range(size))
    shuffle.shuffle(places)  # type: ignore[attr-defined]
    with open_loader(shared_corpus) as loader:
        whole = loader.batch(first, size, range(size))
        shares = [loader.batch(first, size, places[rank::ranks]) for rank in range(ranks)]
    assert joined(shares) == joined([whole])
    assert add_content(*(share.content_sum for share in shares)) == whole.content_sum
    assert [int(place) for share in shares for place in share.batch_position] == [
        p for r in range(ranks) for p in places[r::ranks]
    ]


def test_batches_are_the_same_when_batch_size_changes(loader: Loader) -> None:
    large = loader.batch(0, 24, range(24))
    small = [loader.batch(first, 6, range(6)) for first in range(0, 24, 6)]
    assert torch.equal(large.tokens, torch.cat([batch.tokens for batch in small]))
    assert large.content_sum == add_content(*(batch.content_sum for batch in small))


def test_rows_are_those_of_the_batch_and_read_nothing(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = loader.batch(9, 8, range(8)).rows
    monkeypatch.setattr(SplitReader, "read_rows", lambda *_: pytest.fail("a row was read"))
    assert loader.rows(9, 8) == expected


def test_another_seed_or_window_gives_another_order(shared_corpus: Path, loader: Loader) -> None:
    base = loader.rows(0, 30)
    for seed, window in ((8, 3), (7, 1)):
        with open_loader(shared_corpus, seed=seed, window=window) as other:
            assert other.rows(0, 30) != base


def test_several_shares_wait_in_order(shared_corpus: Path) -> None:
    with open_loader(shared_corpus) as plain, open_loader(shared_corpus) as ahead:
        for first in (0, 6, 12):
            ahead.prefetch(first, 6, [0, 3])
        for first in (0, 12, 18):  # 6 was read for nothing
            assert same(ahead.batch(first, 6, [0, 3]), plain.batch(first, 6, [0, 3]))


@pytest.mark.promise("read-ahead does not change a batch")
def test_prefetch_changes_nothing(shared_corpus: Path) -> None:
    members = [1, 4, 0]
    with open_loader(shared_corpus) as plain, open_loader(shared_corpus) as ahead:
        for first in range(0, 60, 6):
            ahead.prefetch(first, 6, members)
            ahead.prefetch(first, 6, members)
            assert same(ahead.batch(first, 6, members), plain.batch(first, 6, members))
            ahead.prefetch(first + 6, 6, [2])  # guessed wrong: not what is asked next


def test_prefetch_reads_on_a_thread_before_the_batch_is_asked_for(
    shared_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[str] = []
    done = threading.Event()
    real = SplitReader.read_rows

    def read_rows(self: SplitReader, rows: np.ndarray) -> RowBatch:
        readers.append(threading.current_thread().name)
        done.set()
        return real(self, rows)

    monkeypatch.setattr(SplitReader, "read_rows", read_rows)
    with open_loader(shared_corpus) as loader:
        loader.prefetch(0, 4, [2])
        assert done.wait(20)
        loader.batch(0, 4, [2])
    assert len(readers) == 1
    assert readers[0].startswith("megamask-loader")


def test_error_of_the_thread_surfaces_on_the_next_batch(corpus: Path) -> None:
    damage_first_row(corpus)
    with open_loader(corpus) as loader:
        every = range(loader.num_rows)
        loader.prefetch(0, loader.num_rows, every)
        with pytest.raises(DataIntegrityError, match="row 0 of the block"):
            loader.batch(0, loader.num_rows, every)
        whole = [place for place, (_, row) in enumerate(loader.rows(0, loader.num_rows)) if row != 0]
        assert len(loader.batch(0, loader.num_rows, whole).rows) == loader.num_rows - 1


def test_error_of_a_prefetch_that_nobody_asked_for_is_dropped(corpus: Path) -> None:
    damage_first_row(corpus)
    with open_loader(corpus) as loader:
        place = [row for _, row in loader.rows(0, loader.num_rows)].index(0)
        loader.prefetch(0, loader.num_rows, [place])
        other = (place + 1) % loader.num_rows
        assert loader.batch(0, loader.num_rows, [other]).batch_position.tolist() == [other]


def damage_first_row(corpus: Path) -> None:
    index = ShardIndex.unpack((corpus / "shards" / "train-000000.idx").read_bytes(), name="index")
    flip_bit(corpus / "shards" / "train-000000.tar", int(index.blocks["tokens_offset"][0]) + 3)


def test_close_joins_the_thread_and_may_be_called_twice(shared_corpus: Path) -> None:
    loader = open_loader(shared_corpus)
    loader.prefetch(0, 4, range(4))
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("megamask-loader")]
    loader.close()


@pytest.mark.promise("a wrong row in the loader changes content_digest")
def test_content_digest_changes_when_a_wrong_row_is_served(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = loader.batch(0, 8, range(8))
    wrong_at = truth.rows[3][1]
    real = SplitReader.read_rows

    def read_rows(self: SplitReader, rows: np.ndarray) -> RowBatch:
        return real(self, np.where(rows == wrong_at, (rows + 1) % self.num_rows, rows))

    monkeypatch.setattr(SplitReader, "read_rows", read_rows)
    wrong = loader.batch(0, 8, range(8))
    assert wrong.rows == truth.rows  # the law still names the right row; only the content betrays the wrong one
    assert not torch.equal(wrong.tokens, truth.tokens)
    assert content_digest(wrong.content_sum) != content_digest(truth.content_sum)


def test_content_digest_changes_when_two_samples_change_places(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = loader.batch(0, 8, range(8))
    first, second = truth.rows[0][1], truth.rows[5][1]
    real = SplitReader.read_rows
    swap = {first: second, second: first}
    monkeypatch.setattr(
        SplitReader, "read_rows", lambda self, rows: real(self, [swap.get(row, row) for row in rows.tolist()])
    )
    assert loader.batch(0, 8, range(8)).content_sum != truth.content_sum


def test_batch_is_in_pinned_memory_where_a_cuda_device_asks_for_it(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []

    def pin_memory(self: torch.Tensor) -> torch.Tensor:
        threads.append(threading.current_thread().name)
        return self

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    plain = loader.batch(0, 4, [2, 3])
    assert threads == []
    loader.pins_memory = True
    loader.prefetch(0, 4, [2, 3])
    assert same(loader.batch(0, 4, [2, 3]), plain)
    assert len(threads) == 3 and {name.startswith("megamask-loader") for name in threads} == {True}


def test_empty_share_is_an_empty_batch(loader: Loader) -> None:
    batch = loader.batch(0, 4, [])
    assert (batch.tokens.shape, batch.rows, batch.content_sum) == ((0, 16), [], 0)


@pytest.mark.parametrize(("first", "members"), [(0, [4]), (0, [-1]), (-1, [0])])
def test_members_outside_the_batch_are_refused(loader: Loader, first: int, members: list[int]) -> None:
    with pytest.raises(ValueError, match="batch of 4"):
        loader.batch(first, 4, members)


def test_one_row_is_read_by_source_and_number(loader: Loader) -> None:
    assert loader.read("main", 3).tokens.tolist() == ROWS[3]
    with pytest.raises(UsageError, match="no source 'other'"):
        loader.read("other", 3)


def test_corpus_id_is_known_by_name(shared_corpus: Path, loader: Loader) -> None:
    assert loader.corpus_ids == {"main": sha256_file(shared_corpus / "manifest.json")}
    assert loader.source_digest == source_digest(shared_corpus)


def test_validation_split_is_another_source(shared_corpus: Path) -> None:
    with open_loader(shared_corpus, split="validation") as loader:
        expected = packed_rows(random_documents(3, seed=2), sequence_length=16, eod=61, pad=62)
        read = loader.batch(0, loader.num_rows, range(loader.num_rows)).tokens.tolist()
        assert sorted(read) == sorted(expected)
        assert loader.source_digest == source_digest(shared_corpus, "validation")


class TestRefusals:
    """Each names the key to change and ends with exit code 2."""

    def refused(self, match: str, **options: object) -> None:
        with pytest.raises(UsageError, match=match) as caught:
            open_loader(**options)  # type: ignore[arg-type]
        assert caught.value.exit_code == ExitCode.USAGE

    def test_missing_folder_is_refused(self, tmp_path: Path) -> None:
        self.refused(r"data\.corpora\.main is .*nowhere, which is not a folder", folder=tmp_path / "nowhere")

    def test_folder_without_manifest_is_refused(self, tmp_path: Path) -> None:
        self.refused(r"data\.corpora\.main .* it has no manifest\.json", folder=tmp_path)

    def test_other_sequence_length_is_refused(self, shared_corpus: Path) -> None:
        self.refused(r"training\.sequence_length is 32, .* have 16 tokens", folder=shared_corpus, length=32)

    def test_split_without_rows_is_refused(self, corpus: Path) -> None:
        self.refused(r"no split 'validation' .* it has: train", folder=corpus, split="validation")

    @pytest.mark.parametrize("names", [[], ["a", "b"]])
    def test_mixtures_are_refused(self, shared_corpus: Path, names: list[str]) -> None:
        corpora = {name: str(shared_corpus) for name in names}
        with pytest.raises(UsageError, match=r"data\.mixture has 0 stages") as caught:
            Loader(corpora, DataConfig(corpora=corpora), 16)
        assert "one entry under data.corpora" in str(caught.value)

    def test_damaged_manifest_is_an_integrity_error(self, corpus: Path) -> None:
        manifest = corpus / "manifest.json"
        manifest.write_bytes(manifest.read_bytes() + b" ")
        with pytest.raises(DataIntegrityError, match="manifest"):
            open_loader(corpus)
