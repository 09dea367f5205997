"""The watchdog's decision: a limit for each section, learned from longer stays, and no time in which nothing ran."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from megamask.config.schema.watchdog import WatchdogConfig
from megamask.resilience.heartbeat import SECTIONS, Mark
from megamask.resilience.watchdog import Watchdog, limit_s

CONFIG = WatchdogConfig(
    startup_s=100.0,
    first_steps_s=90.0,
    step_s=5.0,
    measure_s=20.0,
    save_s=30.0,
    close_s=40.0,
    factor=8.0,
    learn_steps=20,
)


def mark(section: str, *, num_steps: int = 0, longest_s: float = 0.0, sequence: int = 1) -> Mark:
    return Mark(step=num_steps, section=section, since=0.0, num_steps=num_steps, longest_s=longest_s, sequence=sequence)


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def test_every_section_has_its_limit() -> None:
    limits = {section: limit_s(mark(section, num_steps=100), CONFIG) for section in SECTIONS}
    assert limits == {
        "import": 100.0,
        "rendezvous": 100.0,
        "restore": 100.0,
        "step": 5.0,
        "evaluation": 20.0,
        "preview": 20.0,
        "save": 30.0,
        "agreement": 30.0,
        "close": 40.0,
    }


@pytest.mark.parametrize(
    ("num_steps", "longest_s", "limit"), [(1, 0.0, 90.0), (20, 50.0, 90.0), (21, 0.1, 5.0), (21, 1.0, 8.0)]
)
def test_limit_of_a_step_is_learned_after_the_first_ones(num_steps: int, longest_s: float, limit: float) -> None:
    assert limit_s(mark("step", num_steps=num_steps, longest_s=longest_s), CONFIG) == limit


def test_rank_is_hung_when_its_mark_stays_longer_than_the_limit_and_not_before() -> None:
    clock = Clock()
    watchdog = Watchdog(CONFIG, clock=clock)
    for clock.now in (0.0, 1.0, 2.0, 3.0, 4.0, 5.0):
        still = watchdog.look(
            {0: mark("step", num_steps=30), 1: mark("step", num_steps=30, sequence=int(clock.now) + 2)}
        )
        assert not watchdog.is_hung(still), clock.now
    clock.now = 5.5
    still = watchdog.look({0: mark("step", num_steps=30), 1: mark("step", num_steps=30, sequence=99)})
    assert watchdog.is_hung(still)
    assert (still[0].still_s, still[1].still_s) == (5.5, 0.0)


def test_rank_without_a_mark_counts_as_importing() -> None:
    clock = Clock()
    watchdog = Watchdog(CONFIG, clock=clock)
    for second in range(102):
        clock.now = float(second)
        still = watchdog.look({0: None})
    assert (still[0].mark.section, watchdog.is_hung(still)) == ("import", True)


@pytest.mark.promise("time in which a launcher was suspended counts for no rank of its job")
def test_time_in_which_the_launcher_did_not_run_does_not_count() -> None:
    clock = Clock()
    watchdog = Watchdog(CONFIG, clock=clock)
    watchdog.look({0: mark("step", num_steps=30)})
    clock.now = 3600.0  # the complete job was suspended, or the machine slept
    still = watchdog.look({0: mark("step", num_steps=30)})
    assert not watchdog.is_hung(still)
    for second in range(8):
        clock.now = 3600.0 + second
        still = watchdog.look({0: mark("step", num_steps=30)})
    assert watchdog.is_hung(still)


def test_watchdog_that_is_off_finds_nothing() -> None:
    clock = Clock()
    watchdog = Watchdog(WatchdogConfig(enabled=False, step_s=1.0, startup_s=1.0), clock=clock)
    for second in range(10_000):
        clock.now = float(second)
        still = watchdog.look({0: None})
    assert still[0].still_s > 9000
    assert not watchdog.is_hung(still)
