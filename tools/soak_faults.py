"""Faults of a soak: what is drawn, what is armed inside a process, and which exit codes each may leave."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

from megamask.storage import fault_points

# Exit codes that an attempt may leave after each fault; -9 is a process that died by SIGKILL.
CODES: Mapping[str, frozenset[int]] = {
    "SIGKILL of everything": frozenset({-9}),
    "SIGKILL of one rank": frozenset({1}),
    "SIGKILL at a named point": frozenset({-9, 1}),
    "full disk at a named point": frozenset({0, 74, 75}),  # what is not needed to go on is an incident
    "SIGTERM": frozenset({75}),
    "SIGTERM of one rank": frozenset({75}),
    "SIGSTOP, SIGCONT, then SIGTERM": frozenset({75}),
    "SIGSTOP of one rank, then SIGTERM": frozenset({71, 75}),  # 75: the other still waited for it at the rendezvous
    "full disk": frozenset({74}),
    "clock jump, then SIGKILL": frozenset({-9}),
    "link cut": frozenset({1, 71}),
}
_WEIGHTS = {
    "SIGKILL of everything": 16,
    "SIGKILL of one rank": 8,
    "SIGKILL at a named point": 34,
    "full disk at a named point": 12,
    "SIGTERM": 8,
    "SIGTERM of one rank": 3,
    "SIGSTOP, SIGCONT, then SIGTERM": 5,
    "SIGSTOP of one rank, then SIGTERM": 4,
    "full disk": 6,
    "clock jump, then SIGKILL": 4,
    "link cut": 6,
}
_NEEDS_TWO_RANKS = {"SIGKILL of one rank", "SIGTERM of one rank", "SIGSTOP of one rank, then SIGTERM", "link cut"}
_AT_A_POINT = {"SIGKILL at a named point", "full disk at a named point", "clock jump, then SIGKILL"}
_LAUNCHER = -1


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault.

    Args:
        kind: a key of CODES.
        point, nth: named point at which it happens, and which time it is reached; None for one from outside.
        rank: whom it meets; -1 is the launcher of several ranks.
        wait_s: from the first new step, or from the start where `is_early`, to a fault from outside.
        jump_s: of a clock.
    """

    kind: str
    point: str | None = None
    nth: int = 1
    rank: int = 0
    is_early: bool = False
    wait_s: float = 0.0
    jump_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)


def draw(
    generator: random.Random, num_ranks: int, census: Mapping[int, Counter[str]], absent: set[str], met: set[str]
) -> Fault:
    """Draw a fault, of a kind that no run has met yet where there is one.

    Args:
        census: how often each rank reaches each point in an undisturbed run.
        absent: kinds that this machine cannot do.
        met: kinds that have met a run.
    """
    kinds = [kind for kind in CODES if kind not in absent and (num_ranks > 1 or kind not in _NEEDS_TWO_RANKS)]
    kinds = [kind for kind in kinds if kind not in met] or kinds
    [kind] = generator.choices(kinds, [_WEIGHTS[kind] for kind in kinds])
    rank = generator.randrange(num_ranks)
    point, nth = None, 1
    if kind in _AT_A_POINT:
        if num_ranks > 1 and kind != "clock jump, then SIGKILL" and generator.random() < 0.05:
            rank = _LAUNCHER
        counts = census[rank]
        point = generator.choice(sorted(counts))
        nth = generator.randint(1, max(1, counts[point] // 3))
    return Fault(
        kind=kind,
        point=point,
        nth=nth,
        rank=rank,
        is_early=generator.random() < 0.2,
        wait_s=generator.uniform(0.0, 0.8),
        jump_s=generator.choice((-1, 1)) * generator.uniform(1, 1e6),
    )


def arm(fault: Fault | None, rank: int, census_folder: Path | None) -> None:
    """Arm a fault in this process, if it is the one that it meets; without a fault, count the points.

    Args:
        census_folder: for `points-RANK.json`, rewritten whenever a new point or the end is near.
    """
    if census_folder is not None:
        _count(census_folder / f"points-{rank}.json")
    if fault is None or fault.point is None or fault.rank != rank:
        return
    seen = Counter[str]()

    def follow(point: str) -> None:
        seen[point] += 1
        if point == fault.point and seen[point] == fault.nth:
            _ACTIONS[fault.kind](fault)

    fault_points.follow(follow)


def _count(path: Path) -> None:
    seen = Counter[str]()

    def follow(point: str) -> None:
        seen[point] += 1
        path.write_text(json.dumps(seen), encoding="utf-8")

    fault_points.follow(follow)


def read_census(folder: Path) -> dict[int, Counter[str]]:
    """Return how often each rank reached each point."""
    paths = folder.glob("points-*.json")
    return {int(path.stem[7:]): Counter(json.loads(path.read_text(encoding="utf-8"))) for path in paths}


def _die(_: Fault) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fill(_: Fault) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _jump(fault: Fault) -> None:
    """Shift the wall clock of this process; the monotonic clock does not jump, as on a real machine."""
    plain_time = time.time
    time.time = lambda: plain_time() + fault.jump_s

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.now(tz) + timedelta(seconds=fault.jump_s)

    for name, module in list(sys.modules.items()):
        if name.startswith("megamask") and getattr(module, "datetime", None) is datetime:
            module.datetime = Shifted  # type: ignore[attr-defined]


_ACTIONS: Mapping[str, Callable[[Fault], None]] = {
    "SIGKILL at a named point": _die,
    "full disk at a named point": _fill,
    "clock jump, then SIGKILL": _jump,
}
