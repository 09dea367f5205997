"""Ranks that are slower than the others, named in the journal. Training is not changed by them.

Rule: the times of WINDOW steps are averaged on each rank, for reading (`data`) and for its own passes (`passes`). A
rank is slow in a section of a window if it takes more than RATIO times the median of all ranks there, and the
difference is more than SHARE of the median of both sections together. A rank that is slow in the same section in three
windows in a row is named, and counted anew.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Protocol

from megamask.tracking.records import JournalRecord, Straggler
from megamask.training.metrics import StepRecord
from megamask.training.progress import Progress
from megamask.training.stopping import StopReason

WINDOW = 100
RATIO = 1.15
SHARE = 0.05
NUM_WINDOWS = 3
SECTIONS = ("data", "passes")

Times = tuple[float, ...]


class Gathering(Protocol):
    """The engine as this hook uses it."""

    def gather_objects(self, value: tuple[str, Times]) -> list[tuple[str, Times]]:
        """Return the values of all ranks in rank order, on every rank."""


class Recorder(Protocol):
    """Destination of records: rank 0's journal; the other ranks' recorder drops them."""

    def write(self, record: JournalRecord) -> None:
        """Append one record."""


class StragglerCount:
    """Windows in a row in which each rank was slow, by section."""

    def __init__(self) -> None:
        self._in_a_row: dict[tuple[int, str], int] = {}

    def named(self, times: Sequence[Times]) -> list[tuple[int, str, float, float]]:
        """Take in a window and return (rank, section, its seconds, median seconds) of each rank that is named.

        Args:
            times: mean seconds of a step in each of SECTIONS, by rank.
        """
        medians = [statistics.median_low(column) for column in zip(*times, strict=True)]
        least = SHARE * sum(medians)
        found = []
        for rank, seconds in enumerate(times):
            for section, own, median in zip(SECTIONS, seconds, medians, strict=True):
                key = rank, section
                is_slow = own > RATIO * median and own - median > least
                self._in_a_row[key] = self._in_a_row.get(key, 0) + 1 if is_slow else 0
                if self._in_a_row[key] == NUM_WINDOWS:
                    self._in_a_row[key] = 0
                    found.append((rank, section, own, median))
        return found


class StragglerWatch:
    """Compares the ranks' times every WINDOW steps of an attempt; collective there.

    Args:
        node: of this rank, as its scheduler calls it.
    """

    section = "step"

    def __init__(self, gathering: Gathering, recorder: Recorder, *, node: str, window: int = WINDOW) -> None:
        self._gathering = gathering
        self._recorder = recorder
        self._node = node
        self._window = window
        self._count = StragglerCount()
        self._sums = [0.0] * len(SECTIONS)
        self._num_steps = 0

    def on_start(self, progress: Progress) -> None:
        """No work: a hook like this one acts after steps only."""

    def after_step(self, progress: Progress, record: StepRecord) -> None:
        """Add the step's times, and compare them with the other ranks' at the end of a window."""
        times = (record.fields["seconds"]["data"], record.report.passes_s)
        self._sums = [total + seconds for total, seconds in zip(self._sums, times, strict=True)]
        self._num_steps += 1
        if self._num_steps < self._window:
            return
        means = tuple(total / self._num_steps for total in self._sums)
        self._sums, self._num_steps = [0.0] * len(SECTIONS), 0
        ranks = self._gathering.gather_objects((self._node, means))
        for rank, section, seconds, median in self._count.named([times for _, times in ranks]):
            self._recorder.write(
                Straggler(
                    step=progress.step,
                    rank=rank,
                    node=ranks[rank][0],
                    section=section,
                    seconds_per_step=round(seconds, 6),
                    median_s=round(median, 6),
                )
            )

    def on_stop(self, progress: Progress, reason: StopReason) -> None:
        """Nothing: a window that is not complete is not compared."""
