"""Checkpoints: when and how they are committed, and which are kept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megamask.config.rules.problem import Problem
from megamask.config.schema.field import operational
from megamask.config.schema.section import Section

if TYPE_CHECKING:
    from megamask.config.schema.roots import TrainConfig


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
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

    def problems(self, config: TrainConfig) -> Iterator[Problem]:
        """A best checkpoint needs a checkpoint whose bound is measured."""
        every, steps = config.evaluation.every_steps, config.training.steps
        if self.keep_best == 0:
            return
        if every is None:
            yield Problem(
                key="checkpoint.keep_best",
                because="but evaluation.every_steps is null, so that no checkpoint's bound is measured",
                allowed="0, or any number with evaluation.every_steps set",
            )
            return
        # the last step always commits, and with every_steps=null so does every step that an attempt ends at
        if self.every_steps is not None and math.lcm(every, self.every_steps) > steps and steps % every != 0:
            yield Problem(
                key="checkpoint.keep_best",
                because="but no step up to training.steps is a multiple of both checkpoint.every_steps = "
                f"{self.every_steps} and evaluation.every_steps = {every}, and the last one is not measured",
                allowed="0, or any number with a checkpoint at an evaluated step",
            )
