from __future__ import annotations

import hashlib
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.data.corpus.splits import choose_validation, decimal_text, split_hash
from megamask.errors import ExitCode, UsageError

HASHES = st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=30)
FRACTIONS = st.decimals(0, Decimal("0.9999"), places=4).map(lambda value: format(value, "f"))


@given(hashes=HASHES, fraction=FRACTIONS)
def test_split_follows_the_threshold_exactly_and_leaves_no_side_empty(hashes: list[int], fraction: str) -> None:
    chosen = choose_validation(hashes, fraction)
    below = [Fraction(value) < Fraction(fraction) * 2**64 for value in hashes]
    if Fraction(fraction) == 0:
        assert not chosen.any()
    elif not any(below):
        smallest = sorted(zip(hashes, range(len(hashes)), strict=True))[0][1]
        assert np.flatnonzero(chosen).tolist() == [smallest]
    elif all(below):
        largest = sorted(zip(hashes, range(len(hashes)), strict=True))[-1][1]
        assert np.flatnonzero(~chosen).tolist() == [largest]
    else:
        assert chosen.tolist() == below


@pytest.mark.promise("the split of a document depends only on its text")
@given(hashes=HASHES, more=HASHES)
def test_split_of_a_document_does_not_depend_on_the_others_when_both_sides_are_met(
    hashes: list[int], more: list[int]
) -> None:
    both = [0, 2**64 - 1]
    small = choose_validation([*both, *hashes], "0.3")
    large = choose_validation([*both, *hashes, *more], "0.3")
    assert small.tolist() == large[: len(small)].tolist()


def test_threshold_is_exact_where_floats_are_not() -> None:
    # 0.1 * 2^64 lies between these two integers; float arithmetic is off by hundreds there
    below, above = 1844674407370955161, 1844674407370955162
    assert choose_validation([below, above, 2**64 - 1], "0.1").tolist() == [True, False, False]


def test_single_document_is_refused_unless_the_fraction_is_zero() -> None:
    assert choose_validation([7], "0").tolist() == [False]
    with pytest.raises(UsageError, match="single document") as caught:
        choose_validation([7], "0.02")
    assert caught.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize("fraction", ["1", "-0.1", "1.5"])
def test_fraction_is_refused_outside_its_range(fraction: str) -> None:
    with pytest.raises(UsageError, match="validation_fraction"):
        choose_validation([1, 2], fraction)


def test_split_hash_is_the_first_eight_bytes_little_endian() -> None:
    digest = hashlib.sha256(b"text").digest()
    assert split_hash(digest) == sum(byte << (8 * place) for place, byte in enumerate(digest[:8]))


@given(value=st.floats(0, 1, exclude_max=True))
def test_decimal_text_reads_back_without_exponent(value: float) -> None:
    text = decimal_text(value)
    assert float(text) == value
    assert set(text) <= set("0123456789.")


def test_decimal_text_has_one_form() -> None:
    assert [decimal_text(value) for value in (0, 0.0, 0.02, 0.5, 1e-5)] == ["0", "0", "0.02", "0.5", "0.00001"]
