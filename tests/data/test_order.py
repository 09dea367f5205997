"""The order law: equal to a slow oracle, a permutation in each epoch, and never changed by what comes later."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megamask.data.order import SourceOrder, order_key
from megamask.diffusion import philox_sort
from megamask.diffusion.philox import Purpose, philox4x32
from megamask.errors import UsageError
from megamask.storage.hashing import hash_of
from support.order_oracle import draw_rows, philox4x32_10

GOLDEN = Path(__file__).parent.parent / "golden" / "order_v1.json"

corpora = st.builds(
    lambda full, blocks, last: [full] * blocks + [min(last, full)],
    full=st.integers(1, 7),
    blocks=st.integers(0, 9),
    last=st.integers(1, 7),
)
keys = st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
windows = st.integers(1, 12)


def test_oracle_holds_the_published_philox_vectors() -> None:
    # Random123's known answers for philox4x32-10: zeros, ones, digits of pi
    assert philox4x32_10((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = 0xFFFFFFFF
    assert philox4x32_10((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox4x32_10(pi, (0xA4093822, 0x299F31D0)) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


@pytest.mark.promise("rows are served in the order defined by the order law")
@given(block_rows=corpora, key=keys, window=windows, start=st.integers(0, 300), count=st.integers(0, 40))
def test_order_equals_a_slow_oracle(
    block_rows: list[int], key: tuple[int, int], window: int, start: int, count: int
) -> None:
    order = SourceOrder(block_rows, key=key, window_blocks=window)
    assert order.rows(start, count).tolist() == draw_rows(block_rows, start, count, key, window)


@pytest.mark.promise("an epoch serves every row exactly once")
@given(block_rows=corpora, key=keys, window=windows, epoch=st.integers(0, 5))
def test_epoch_is_a_permutation_of_all_rows(
    block_rows: list[int], key: tuple[int, int], window: int, epoch: int
) -> None:
    order = SourceOrder(block_rows, key=key, window_blocks=window)
    rows = order.rows(epoch * order.num_rows, order.num_rows)
    assert sorted(rows.tolist()) == list(range(sum(block_rows)))


@given(block_rows=corpora, key=keys, window=windows, draws=st.lists(st.integers(0, 40), min_size=1, max_size=12))
def test_row_is_the_same_whatever_was_asked_before(
    block_rows: list[int], key: tuple[int, int], window: int, draws: list[int]
) -> None:
    used = SourceOrder(block_rows, key=key, window_blocks=window)
    whole = SourceOrder(block_rows, key=key, window_blocks=window).rows(0, 41)
    assert [used.row(draw) for draw in draws] == [int(whole[draw]) for draw in draws]


@pytest.mark.promise("a longer run never changes the past")
def test_prefix_is_unchanged_when_a_run_is_extended_over_epochs() -> None:
    block_rows = [8, 8, 8, 3]
    short = SourceOrder(block_rows, key=(1, 2), window_blocks=2).rows(0, 20)
    long = SourceOrder(block_rows, key=(1, 2), window_blocks=2).rows(0, 200)
    assert np.array_equal(long[:20], short)


def test_epochs_are_shuffled_differently() -> None:
    order = SourceOrder([8] * 8, key=(1, 2), window_blocks=4)
    assert order.rows(0, 64).tolist() != order.rows(64, 64).tolist()


def test_rows_stay_in_the_window_of_their_blocks() -> None:
    order = SourceOrder([5] * 12, key=(7, 7), window_blocks=3)
    for window in np.split(order.rows(0, 60) // 5, 4):
        assert len(set(window.tolist())) == 3


def test_key_is_that_of_seed_source_and_split() -> None:
    digest = hash_of(7, "ab", "train")
    value = int.from_bytes(bytes.fromhex(digest)[:8], "little")
    assert order_key(7, "ab", "train") == (value % 2**32, value // 2**32)
    others = {order_key(8, "ab", "train"), order_key(7, "ac", "train"), order_key(7, "ab", "validation")}
    assert order_key(7, "ab", "train") not in others


@pytest.mark.promise("rows are served in the order defined by the order law")
def test_order_equals_the_golden_integers_of_version_1() -> None:
    cases = json.loads(GOLDEN.read_text())["cases"]
    assert len(cases) >= 4
    for case in cases:
        key = (case["key"][0], case["key"][1])
        order = SourceOrder(case["block_rows"], key=key, window_blocks=case["window"])
        assert order.rows(case["start"], len(case["rows"])).tolist() == case["rows"]
        if "source_digest" in case:
            assert order_key(case["data_seed"], case["source_digest"], case["split"]) == key


def test_a_hundred_million_rows_are_ordered_without_listing_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counting(counter: tuple[torch.Tensor, ...], key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
        made.append(counter[0].numel())
        return philox4x32(counter, key)  # type: ignore[arg-type]

    monkeypatch.setattr(philox_sort, "philox4x32", counting)
    block_rows = np.full(400_000, 256)
    block_rows[-1] = 5
    order = SourceOrder(block_rows, key=(3, 4), window_blocks=16)
    rows = order.rows(50_000_000, 512)
    assert len(set(rows.tolist())) == 512
    assert rows.min() >= 0 and rows.max() < order.num_rows > 10**8
    assert sum(made) <= 400_000 + 2 * 16 * 256  # the blocks once, and the rows of at most two windows
    made.clear()
    order.rows(50_000_512, 512)
    assert sum(made) <= 16 * 256  # the order of the blocks is kept from batch to batch


@pytest.mark.parametrize("block_rows", [[], [4, 0, 4]])
def test_order_refuses_blocks_without_rows(block_rows: list[int]) -> None:
    with pytest.raises(UsageError, match="at least one"):
        SourceOrder(block_rows, key=(0, 0), window_blocks=1)


def test_order_refuses_a_window_of_zero_and_names_the_key() -> None:
    with pytest.raises(UsageError, match=r"data\.shuffle_window_blocks is 0"):
        SourceOrder([4], key=(0, 0), window_blocks=0)


def test_order_refuses_negative_draws() -> None:
    with pytest.raises(UsageError, match="counted from 0"):
        SourceOrder([4], key=(0, 0), window_blocks=1).rows(-1, 2)


def test_equal_words_are_ordered_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def constant(counter: tuple[torch.Tensor, ...], key: tuple[int, int]) -> list[torch.Tensor]:
        return [torch.full_like(counter[0], 5)] * 4

    monkeypatch.setattr(philox_sort, "philox4x32", constant)
    by_words = philox_sort.sort_by_words(np.array([7, 2, 9]), 0, Purpose.ROW_ORDER, (0, 0))
    assert by_words.tolist() == [2, 7, 9]
