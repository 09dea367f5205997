"""The parts of rows that context-parallel ranks compute."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.engine.sequence import places_of_rank


@given(size=st.integers(1, 8), piece=st.integers(1, 5))
def test_every_position_belongs_to_one_rank_and_parts_are_equal(size, piece):
    length = 2 * size * piece
    parts = [places_of_rank(length, size, rank) for rank in range(size)]
    assert sorted(place for part in parts for place in part) == list(range(length))
    assert {len(part) for part in parts} == {2 * piece}
    assert all(part == sorted(part) for part in parts)


@given(size=st.integers(1, 8), piece=st.integers(1, 5))
def test_ranks_see_equally_many_keys_of_a_causal_row_and_both_halves_of_a_doubled_one(size, piece):
    length = 2 * size * piece
    parts = [places_of_rank(length, size, rank) for rank in range(size)]
    assert len({sum(place + 1 for place in part) for part in parts}) == 1
    assert {sum(place < length // 2 for place in part) for part in parts} == {piece}


def test_a_row_that_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="a row of 12 positions cannot be cut into 8 equal pieces"):
        places_of_rank(12, 4, 0)
