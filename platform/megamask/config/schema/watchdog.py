"""Settings of the watchdog: how long a rank may stay in one section of an attempt before the job counts as hung."""

from __future__ import annotations

from dataclasses import dataclass

from megamask.config.schema.field import operational
from megamask.config.schema.section import Section


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig(Section):
    """Rules by which the launcher finds a hang: a rank that exceeds the limit of its section ends the job (71)."""

    enabled: bool = operational(
        "end a job whose ranks make no progress (71), with the stacks of every rank; where each rank is started by "
        "another launcher, nothing is watched",
        default=True,
    )
    startup_s: float = operational(
        "limit of the imports, of the wait for the other ranks, and of the restore, each",
        default=1800.0,
        minimum=1.0,
        unit="seconds",
    )
    first_steps_s: float = operational(
        "limit of a step while the attempt has taken fewer than learn_steps",
        default=1800.0,
        minimum=1.0,
        unit="seconds",
    )
    step_s: float = operational(
        "least limit of a step after the first ones; a stall of the storage may last about this long",
        default=300.0,
        minimum=1.0,
        unit="seconds",
    )
    measure_s: float = operational(
        "least limit of an evaluation and of a preview", default=1800.0, minimum=1.0, unit="seconds"
    )
    save_s: float = operational(
        "least limit of a save, as training waits for it", default=1800.0, minimum=1.0, unit="seconds"
    )
    close_s: float = operational("limit of the end of an attempt", default=600.0, minimum=1.0, unit="seconds")
    factor: float = operational(
        "a limit is at least this many times the longest stay in its section so far", default=8.0, minimum=1.0
    )
    learn_steps: int = operational(
        "steps of an attempt after which the limit of a step follows the longest one",
        default=20,
        minimum=1,
        unit="steps",
    )
