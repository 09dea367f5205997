"""Settings of a run's processes: time to stop, and time to answer one another."""

from __future__ import annotations

from dataclasses import dataclass

from megamask.config.schema.field import operational
from megamask.config.schema.section import Section


@dataclass(frozen=True, kw_only=True)
class LaunchConfig(Section):
    """Time that processes get to stop, and to answer one another."""

    stop_grace_s: float = operational(
        "from the first signal that asks for an end until a rank that does not answer is ended; a save that has begun "
        "gets launch.save_budget_s more",
        default=25.0,
        minimum=1.0,
        unit="seconds",
    )
    save_budget_s: float = operational(
        "the longest time that the last save of an attempt may take beyond launch.stop_grace_s",
        default=60.0,
        minimum=0.0,
        unit="seconds",
    )
    collective_timeout_s: float = operational(
        "how long a rank waits for the others in one collective call; a first step, a save and an evaluation may lie "
        "between two of them",
        default=1800.0,
        minimum=1.0,
        unit="seconds",
    )
