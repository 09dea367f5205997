"""Positions and sample indices of a run that leaves samples out, against a plain walk over the indices."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamask.data.content import batch_digest
from megamask.data.skipped import SKIPS_NOTHING, SkippedSamples

RANGES = st.lists(st.tuples(st.integers(0, 120), st.integers(0, 25)).map(lambda pair: range(pair[0], sum(pair))))


def used(ranges: list[range], count: int) -> list[int]:
    """The first indices that no range holds, one after the other."""
    skipped = {index for each in ranges for index in each}
    return list(itertools.islice((index for index in itertools.count() if index not in skipped), count))


@pytest.mark.promise("a run that leaves samples out uses every other sample exactly once, in order")
@settings(max_examples=300, deadline=None, derandomize=True)
@given(ranges=RANGES, position=st.integers(0, 90), count=st.integers(0, 40))
def test_positions_are_the_indices_that_no_range_holds(ranges: list[range], position: int, count: int) -> None:
    skipped, expected = SkippedSamples.of(ranges), used(ranges, position + count)
    assert [skipped.index(place) for place in range(position + count)] == expected
    segments = skipped.segments(position, count)
    assert [index for each in segments for index in each] == expected[position:]
    assert all(one.stop < two.start for one, two in itertools.pairwise(segments))
    assert all(segments)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(ranges=RANGES, index=st.integers(0, 200))
def test_position_is_the_inverse_of_index(ranges: list[range], index: int) -> None:
    skipped = SkippedSamples.of(ranges)
    position = skipped.position(index)
    assert (position is None) == any(index in each for each in ranges)
    if position is not None:
        assert skipped.index(position) == index


@settings(max_examples=200, deadline=None, derandomize=True)
@given(ranges=RANGES, more=RANGES, seen=st.integers(0, 60))
def test_leaving_out_what_was_not_used_yet_changes_no_sample_that_was(
    ranges: list[range], more: list[range], seen: int
) -> None:
    before = SkippedSamples.of(ranges)
    later = [range(max(each.start, before.index(seen)), each.stop) for each in more]
    after = SkippedSamples.of([*ranges, *later])
    assert [after.index(place) for place in range(seen)] == [before.index(place) for place in range(seen)]


def test_run_that_leaves_nothing_out_has_version_1_of_the_order_law() -> None:
    assert [SKIPS_NOTHING.index(place) for place in (0, 7, 2**40)] == [0, 7, 2**40]
    assert SKIPS_NOTHING.segments(2**40, 8) == [range(2**40, 2**40 + 8)]
    assert batch_digest(16, 8, SKIPS_NOTHING) == batch_digest(16, 8)


def test_digest_of_a_batch_is_that_of_its_indices() -> None:
    skipped = SkippedSamples.of([range(4, 8)])
    assert batch_digest(4, 4, skipped) == batch_digest(8, 4)
    assert batch_digest(2, 4, skipped) not in {batch_digest(2, 4), batch_digest(8, 4)}


def test_ranges_that_are_none_of_sample_indices_are_refused() -> None:
    with pytest.raises(ValueError, match="not a range of sample indices"):
        SkippedSamples.of([range(-1, 4)])
    with pytest.raises(ValueError, match="not a range of sample indices"):
        SkippedSamples.of([range(0, 8, 2)])
