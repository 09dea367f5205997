"""When and how checkpoints are committed, and which are kept."""

from __future__ import annotations

from dataclasses import dataclass

from megamask.config.schema.field import operational


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Intervals and retention; the last step always commits."""

    every_steps: int | None = operational(
        "commit a checkpoint every so many steps; null means only at the end", default=None, minimum=1, unit="steps"
    )
    asynchronous: bool = operational(
        "write a checkpoint while training goes on, from a copy of each rank's share in host memory (12 bytes a "
        "weight); false blocks training until it is committed",
        default=True,
    )
    keep_last: int = operational("newest checkpoints to keep", default=2, minimum=1, unit="checkpoints")
    keep_every_steps: int | None = operational(
        "also keep, for ever, the checkpoints whose step is a multiple of this; null keeps none for that",
        default=None,
        minimum=1,
        unit="steps",
    )
    keep_best: int = operational(
        "also keep so many checkpoints with the lowest bound measured at their own step (evaluation.every_steps)",
        default=0,
        minimum=0,
        unit="checkpoints",
    )
