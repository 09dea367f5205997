"""Retention: the checkpoints that stay."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.checkpoint.policy import Candidate, retained


def at(
    step: int, bound: float | None = None, *, attempt: int = 1, good: bool = True, pinned: bool = False
) -> Candidate:
    return Candidate(name=f"{step}-{attempt}", step=step, attempt=attempt, is_good=good, is_pinned=pinned, bound=bound)


def steps(kept: set[str]) -> list[int]:
    return sorted(int(name.split("-")[0]) for name in kept)


def test_newest_multiples_best_and_pinned_stay() -> None:
    bounds = {10: 5.0, 20: 2.0, 30: 4.0, 40: None, 50: 3.0, 60: 9.0}
    given_ = [at(step, bound, pinned=step == 10) for step, bound in bounds.items()]
    assert steps(retained(given_, keep_last=1)) == [10, 60]
    assert steps(retained(given_, keep_last=2)) == [10, 50, 60]
    assert steps(retained(given_, keep_last=1, keep_every_steps=20)) == [10, 20, 40, 60]
    assert steps(retained(given_, keep_last=1, keep_best=2)) == [10, 20, 50, 60]


def test_best_are_those_of_the_newest_kind_of_bound() -> None:
    """Blocks of one token have a lower bound than longer ones, and are another model."""
    given_ = [at(10, 1.0), replace(at(20, 3.0), bound_from_step=15), replace(at(30, 2.0), bound_from_step=15), at(40)]
    assert steps(retained(given_, keep_last=1, keep_best=1)) == [30, 40]
    assert steps(retained(given_, keep_last=1, keep_best=3)) == [20, 30, 40]


def test_newer_of_two_equal_bounds_stays() -> None:
    given_ = [at(10, 2.0), at(20, 2.0, attempt=1), at(20, 2.0, attempt=2), at(30, 3.0)]
    assert retained(given_, keep_last=1, keep_best=1) == {"30-1", "20-2"}


def test_bound_that_is_no_number_is_never_the_best() -> None:
    given_ = [at(10, math.nan), at(20, -math.inf), at(30, 7.0), at(40)]
    assert steps(retained(given_, keep_last=1, keep_best=2)) == [30, 40]


def test_damaged_one_counts_for_nothing_and_stays_while_too_few_are_good() -> None:
    given_ = [at(10, 5.0), at(20, 1.0, good=False), at(30, good=False)]
    assert steps(retained(given_, keep_last=2, keep_best=1)) == [10, 20, 30]
    assert steps(retained(given_, keep_last=1, keep_best=1, keep_every_steps=10)) == [10]
    assert steps(retained([*given_, at(40, good=False, pinned=True)], keep_last=1)) == [10, 40]


candidates = st.lists(
    st.builds(
        at,
        st.integers(1, 12),
        st.none() | st.sampled_from([1.0, 2.0, 3.0, math.nan]),
        attempt=st.integers(1, 3),
        good=st.booleans(),
        pinned=st.booleans(),
    ),
    max_size=12,
    unique_by=lambda each: each.name,
)


@pytest.mark.promise("exactly the newest, every n-th, the best and the pinned checkpoints are kept")
@given(candidates, st.integers(1, 4), st.none() | st.integers(1, 5), st.integers(0, 3))
def test_a_checkpoint_goes_exactly_when_no_rule_keeps_it(
    given_: list[Candidate], last: int, every: int | None, best: int
) -> None:
    kept = retained(given_, keep_last=last, keep_every_steps=every, keep_best=best)
    good = [each for each in given_ if each.is_good]
    for each in given_:
        newer = sum(other.age > each.age for other in good)
        better = sum(
            other.bound is not None
            and each.bound is not None
            and (other.bound < each.bound or (other.bound == each.bound and other.age > each.age))
            for other in good
        )
        is_measured = each.bound is not None and math.isfinite(each.bound)
        is_multiple = every is not None and each.step % every == 0
        by_rule = each.is_good and (newer < last or is_multiple or (is_measured and better < best))
        assert (each.name in kept) == (len(good) < last or each.is_pinned or by_rule)


@given(candidates, st.integers(1, 4), st.none() | st.integers(1, 5), st.integers(0, 3))
def test_pruning_twice_is_pruning_once(given_: list[Candidate], last: int, every: int | None, best: int) -> None:
    kept = retained(given_, keep_last=last, keep_every_steps=every, keep_best=best)
    left = [each for each in given_ if each.name in kept]
    assert retained(left, keep_last=last, keep_every_steps=every, keep_best=best) == kept
