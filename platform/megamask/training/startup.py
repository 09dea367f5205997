"""Duration of an attempt's start by phase, counted from the start of its process."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from megamask.resilience.process_facts import own_age

_PHASES = ("imports", "engine", "restore")


class StartupClock:
    """Made when the job's own code begins: what lies before is Python, the config and imports.

    Args:
        age_s: of the attempt; None for that of the process.
    """

    def __init__(self, age_s: float | None = None) -> None:
        self._began = time.monotonic() - (own_age() if age_s is None else age_s)
        self._seconds = dict.fromkeys(_PHASES, 0.0)
        self._seconds["imports"] = time.monotonic() - self._began

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of a block to a phase: imports, engine or restore."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] += time.monotonic() - started

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase so far, and in all since the process started; these hold what no phase counts too."""
        total = time.monotonic() - self._began
        return {name: round(value, 6) for name, value in (*self._seconds.items(), ("total", total))}
