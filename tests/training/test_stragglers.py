"""Slow ranks are named by a rule on the times of all ranks, and only by it."""

from __future__ import annotations

from typing import Any

import pytest

from megamask.tracking.records import JournalRecord, Straggler
from megamask.training.metrics import StepRecord
from megamask.training.progress import Progress
from megamask.training.stragglers import StragglerCount, StragglerWatch

EVEN = (0.01, 1.0)


def test_rank_that_is_slow_in_three_windows_in_a_row_is_named_once() -> None:
    count = StragglerCount()
    slow = [EVEN, EVEN, (0.01, 1.2), EVEN]
    assert [count.named(slow) for _ in range(3)] == [[], [], [(2, "passes", 1.2, 1.0)]]
    assert [count.named(slow) for _ in range(3)] == [[], [], [(2, "passes", 1.2, 1.0)]]


def test_window_in_between_without_delay_begins_the_count_anew() -> None:
    count = StragglerCount()
    slow = [EVEN, EVEN, (0.01, 1.2)]
    named = [count.named(times) for times in (slow, slow, [EVEN] * 3, slow, slow)]
    assert named == [[]] * 5


@pytest.mark.parametrize(
    "times",
    [
        [EVEN, EVEN, (0.01, 1.15)],  # not more than the ratio
        [EVEN, EVEN, (0.05, 1.0)],  # five times as long to read, but nothing beside the passes
        [(0.01, 0.5), EVEN, EVEN],  # fast is not slow
    ],
)
def test_small_differences_name_no_rank(times: list[tuple[float, float]]) -> None:
    count = StragglerCount()
    assert [count.named(times) for _ in range(9)] == [[]] * 9


def test_slow_reading_is_named_as_such() -> None:
    count = StragglerCount()
    assert [count.named([EVEN, (0.5, 1.0), EVEN]) for _ in range(3)][2] == [(1, "data", 0.5, 0.01)]


class Ranks:
    """Three ranks of which this one is the second."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[float, ...]]] = []
        self.records: list[JournalRecord] = []

    def gather_objects(self, value: tuple[str, tuple[float, ...]]) -> list[tuple[str, tuple[float, ...]]]:
        self.calls.append(value)
        return [("host-0", EVEN), value, ("host-2", EVEN)]

    def write(self, record: JournalRecord) -> None:
        self.records.append(record)


class Report:
    passes_s = 2.0


def test_hook_compares_means_at_the_end_of_each_window() -> None:
    ranks = Ranks()
    hook = StragglerWatch(ranks, ranks, node="host-1", window=2)
    report: Any = Report()
    for step in range(1, 8):
        record = StepRecord(report=report, fields={"seconds": {"data": 0.01 * (step % 2)}})
        hook.after_step(Progress(step=step, num_views=1), record)
    assert ranks.calls == [("host-1", (0.005, 2.0))] * 3
    [named] = ranks.records
    assert isinstance(named, Straggler)
    assert (named.step, named.rank, named.node, named.section) == (6, 1, "host-1", "passes")
    assert (named.seconds_per_step, named.median_s) == (2.0, 1.0)
