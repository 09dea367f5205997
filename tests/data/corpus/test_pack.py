from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megamask.data.corpus.pack import RowGroup, RowPacker, token_dtype

EOD, PAD = 97, 98
DOCUMENTS = st.lists(st.lists(st.integers(0, 96), max_size=40), min_size=1, max_size=12)


def pack(documents: list[list[int]], length: int, rows: int) -> tuple[list[RowGroup], RowPacker]:
    packer = RowPacker(sequence_length=length, rows_per_block=rows, dtype=token_dtype(100), pad_token_id=PAD)
    blocks: list[RowGroup] = []
    for number, document in enumerate(documents):
        blocks += packer.add(number, np.array([*document, EOD]))
    blocks += packer.finish()
    return blocks, packer


@given(documents=DOCUMENTS, length=st.integers(1, 20), rows=st.integers(1, 5))
def test_packing_loses_and_reorders_nothing(documents: list[list[int]], length: int, rows: int) -> None:
    blocks, packer = pack(documents, length, rows)
    flat = np.concatenate([block.tokens for block in blocks]).reshape(-1)
    expected = [token for document in documents for token in [*document, EOD]]
    assert flat[: len(expected)].tolist() == expected
    padding = flat[len(expected) :]
    assert len(padding) < length
    assert (padding == PAD).all()
    assert (packer.num_tokens, packer.num_padding) == (len(expected), len(padding))


@given(documents=DOCUMENTS, length=st.integers(1, 20), rows=st.integers(1, 5))
def test_blocks_are_full_but_the_last(documents: list[list[int]], length: int, rows: int) -> None:
    blocks, _ = pack(documents, length, rows)
    assert all(block.tokens.shape == (rows, length) for block in blocks[:-1])
    assert 1 <= len(blocks[-1].tokens) <= rows


@given(documents=DOCUMENTS, length=st.integers(1, 20), rows=st.integers(1, 5))
def test_every_row_lists_every_document_that_has_a_token_in_it(
    documents: list[list[int]], length: int, rows: int
) -> None:
    blocks, _ = pack(documents, length, rows)
    owner = [number for number, document in enumerate(documents) for _ in [*document, EOD]]
    row_in_split = 0
    for block in blocks:
        entries = block.docs.tolist()
        assert entries == sorted(entries)
        for row in range(len(block.tokens)):
            owners = owner[row_in_split * length : (row_in_split + 1) * length]
            changes = [start for start in range(len(owners)) if start == 0 or owners[start] != owners[start - 1]]
            expected = [[row, start, owners[start]] for start in changes]
            assert [entry for entry in entries if entry[0] == row] == expected
            row_in_split += 1


def test_token_dtype_is_16_bits_up_to_65536_entries() -> None:
    assert token_dtype(65536).str == "<u2"
    assert token_dtype(65537).str == "<u4"
