"""The watchdog's decision: which ranks have stayed in one section for longer than they may.

A launcher reads the marks of its ranks (heartbeat.py) and asks here. Time in which the launcher itself did not run, as
in a suspended job or on a sleeping laptop, counts for no rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megamask.config.schema.watchdog import WatchdogConfig
from megamask.resilience.heartbeat import BEFORE_TRAINING, Mark

# A pause between two looks that is longer than this was a pause of the launcher itself.
_MAX_LOOK_S = 2.0


def limit_s(mark: Mark, config: WatchdogConfig) -> float:
    """Return how long a rank may stay where it is."""
    if mark.section in BEFORE_TRAINING:
        return config.startup_s
    if mark.section == "step" and mark.num_steps <= config.learn_steps:
        return config.first_steps_s
    floors = {
        # here a rank waits for those that still measure or save
        "agreement": max(config.step_s, config.measure_s, config.save_s),
        "step": config.step_s,
        "evaluation": config.measure_s,
        "preview": config.measure_s,
        "save": config.save_s,
        "close": config.close_s,
    }
    return max(floors[mark.section], config.factor * mark.longest_s)


@dataclass(frozen=True, kw_only=True)
class Stillness:
    """Time that a rank has been at one mark, in seconds in which the launcher ran, and its limit."""

    mark: Mark
    still_s: float
    limit_s: float


class Watchdog:
    """Observer of the marks of some ranks.

    Args:
        clock: seconds of a monotonic clock.
    """

    def __init__(self, config: WatchdogConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._looked_at = clock()
        self._awake_s = 0.0
        self._since: dict[int, tuple[Mark, float]] = {}

    def look(self, marks: Mapping[int, Mark | None]) -> dict[int, Stillness]:
        """Take in the marks of all running ranks and return how still each is.

        A rank without a mark has not begun; it counts as importing.
        """
        now = self._clock()
        self._awake_s += min(max(0.0, now - self._looked_at), _MAX_LOOK_S)
        self._looked_at = now
        stillness: dict[int, Stillness] = {}
        for rank, found in marks.items():
            mark = found or Mark(step=0, section="import", since=0.0)
            known, since = self._since.get(rank, (None, 0.0))
            if known != mark:
                since = self._awake_s
                self._since[rank] = mark, since
            stillness[rank] = Stillness(mark=mark, still_s=self._awake_s - since, limit_s=limit_s(mark, self._config))
        return stillness

    def is_hung(self, stillness: Mapping[int, Stillness]) -> bool:
        """Return whether a rank has exceeded its limit."""
        return self._config.enabled and any(rank.still_s > rank.limit_s for rank in stillness.values())
