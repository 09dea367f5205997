"""AdamW and its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megamask.config.rules.problem import Problem
from megamask.config.schema.field import identity
from megamask.config.schema.section import Section

if TYPE_CHECKING:
    from megamask.config.schema.roots import TrainConfig


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """AdamW and the schedule of its learning rate, which training/schedules.py defines."""

    learning_rate: float = identity("peak learning rate", above=0)
    lr_schedule: str = identity(
        "course of the learning rate after warm-up: constant; wsd (constant, then linear decay); cosine (down to "
        "training.steps); inverse_sqrt (peak * sqrt(warm-up / position), then linear decay)",
        default="wsd",
        choices=("constant", "cosine", "wsd", "inverse_sqrt"),
    )
    schedule_unit: str = identity(
        "what the learning-rate schedule counts: steps, or tokens (samples * training.sequence_length)",
        default="steps",
        choices=("steps", "tokens"),
    )
    min_learning_rate: float = identity("learning rate that a falling schedule ends at", default=0.0, minimum=0)
    warmup_steps: int = identity(
        "steps of linear warm-up; clipped to training.steps", default=0, minimum=0, unit="steps"
    )
    warmup_tokens: int = identity(
        "tokens of linear warm-up, with schedule_unit tokens; clipped to those of training.steps",
        default=0,
        minimum=0,
        unit="tokens",
    )
    decay_steps: int = identity(
        "last steps of training.steps over which the rate falls linearly; clipped to what warm-up leaves",
        default=0,
        minimum=0,
        unit="steps",
    )
    decay_tokens: int = identity(
        "last tokens of the run over which the rate falls linearly, with schedule_unit tokens; clipped likewise",
        default=0,
        minimum=0,
        unit="tokens",
    )
    weight_decay: float = identity(
        "decoupled weight decay; the next keys choose the tensors beside matrices", default=0.1, minimum=0
    )
    weight_decay_on_norms: bool = identity("whether weight decay applies to the weights of norms", default=False)
    weight_decay_on_biases: bool = identity("whether weight decay applies to biases", default=False)
    weight_decay_on_embeddings: bool = identity(
        "whether weight decay applies to the token embedding, which tied embeddings share with the output layer",
        default=True,
    )
    beta1: float = identity("decay of the first moment", default=0.9, minimum=0, below=1)
    beta2: float = identity("decay of the second moment", default=0.95, minimum=0, below=1)
    eps: float = identity("term added to the denominator", default=1e-8, above=0)
    lr_multipliers: list[str] = identity(
        "factor on the learning rate of the tensors whose canonical name fits a pattern, as "
        "model.layers.*.self_attn.*=2; of several that fit the last one counts, 0 freezes",
        default=[],
        takes_mapping=True,
    )
    clip_grad_norm: float = identity("largest global gradient norm; 0 switches clipping off", default=1.0, minimum=0)

    def multipliers(self) -> list[tuple[str, float]]:
        """Pattern and factor of each entry of `lr_multipliers`.

        Raises:
            ValueError: an entry is not PATTERN=FACTOR with a finite factor from 0 on.
        """
        found = []
        for entry in self.lr_multipliers:
            pattern, sign, factor = entry.rpartition("=")
            number = float(factor)
            if not (sign and pattern and math.isfinite(number) and number >= 0):
                raise ValueError(entry)
            found.append((pattern, number))
        return found

    def problems(self, config: TrainConfig) -> Iterator[Problem]:
        """Settings of the schedule that contradict one another or that it would not carry out."""
        del config
        try:
            self.multipliers()
        except ValueError:
            yield Problem(
                key="optimizer.lr_multipliers",
                because="of which an entry is not a pattern and a factor",
                allowed="PATTERN=FACTOR, or a mapping of patterns to factors; a factor is a number >= 0",
            )
        if self.min_learning_rate > self.learning_rate:
            yield Problem(
                key="optimizer.min_learning_rate",
                because=f"but optimizer.learning_rate is {self.learning_rate}",
                allowed=f"0 to {self.learning_rate}",
            )
        unit, other = self.schedule_unit, "tokens" if self.schedule_unit == "steps" else "steps"
        for name in ("warmup", "decay"):
            if getattr(self, f"{name}_{other}") > 0:
                yield Problem(
                    key=f"optimizer.{name}_{other}",
                    because=f"but optimizer.schedule_unit is {unit}",
                    allowed=f"0, with optimizer.{name}_{unit} in its place; or optimizer.schedule_unit={other}",
                )
        yield from self._course_problems(warmup=getattr(self, f"warmup_{unit}"), decay=getattr(self, f"decay_{unit}"))

    def _course_problems(self, *, warmup: int, decay: int) -> Iterator[Problem]:
        """The course after warm-up; lengths are in the schedule's own unit."""
        course, unit = self.lr_schedule, self.schedule_unit
        if decay > 0 and course in ("constant", "cosine"):
            why = (
                "which never falls" if course == "constant" else "which falls from the end of warm-up to training.steps"
            )
            yield Problem(
                key=f"optimizer.decay_{unit}",
                because=f"but optimizer.lr_schedule is {course}, {why}",
                allowed="0; or another optimizer.lr_schedule: wsd, inverse_sqrt",
            )
        if warmup == 0 and course == "inverse_sqrt":
            yield Problem(
                key=f"optimizer.warmup_{unit}",
                because="but optimizer.lr_schedule is inverse_sqrt, which after warm-up is peak * sqrt(warm-up / "
                "position)",
                allowed="an integer >= 1",
            )
        if self.min_learning_rate > 0 and course == "constant":
            yield Problem(
                key="optimizer.min_learning_rate",
                because="but optimizer.lr_schedule is constant, so that the rate never falls",
                allowed="0; or another optimizer.lr_schedule: wsd, cosine, inverse_sqrt",
            )
        if self.min_learning_rate > 0 and course == "wsd" and decay == 0:
            yield Problem(
                key="optimizer.min_learning_rate",
                because=f"but optimizer.decay_{unit} is 0, so that the rate never falls",
                allowed=f"0, or any rate with optimizer.decay_{unit} above 0",
            )
