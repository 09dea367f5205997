"""The learning rate of each step: a pure function of the step and the settings, the same after any restart."""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_right
from dataclasses import dataclass

from megamask.config.schema.optimizer import OptimizerConfig
from megamask.config.schema.training import TrainingConfig
from megamask.errors import UsageError
from megamask.training.batch_size import consumed_before


def learning_rate(step: int, optimizer: OptimizerConfig, training: TrainingConfig) -> float:
    """The rate of an update.

    x is the position after the update, W the end of warm-up, H the position after training.steps and D the length of
    the decay, all in steps or all in tokens (`optimizer.schedule_unit`; tokens = samples * training.sequence_length,
    so the position is arithmetic under a batch-size ramp too). W is clipped to H and D to H - W. Up to W every
    schedule rises linearly from 0 to the peak. Then:

        constant      peak
        wsd           peak, and over the last D a straight line to the minimum (MiniCPM, arXiv:2404.06395, section 4)
        cosine        half a cosine from the peak to the minimum at H (SGDR without restarts, arXiv:1608.03983, eq. 5)
        inverse_sqrt  peak * sqrt(W / x), never below the minimum (Vaswani et al., arXiv:1706.03762, section 5.3, whose
                      factor d_model^-0.5 is folded into the peak), and over the last D a straight line to the minimum
                      (the cool-down of Zhai et al., arXiv:2106.04560, section 3.5)

    Args:
        step: 1-based number of the update.

    Returns: between 0 and the peak; after warm-up never below min_learning_rate.
    """
    return _curve(optimizer, training).rate(_position(step, optimizer, training))


def check_extension(
    optimizer: OptimizerConfig, training: TrainingConfig, *, recorded_steps: int, completed: int
) -> None:
    """Refuse a change of training.steps that would change the past.

    Decided by where the schedule begins to depend on training.steps, not by going through the steps.

    Args:
        training: with training.steps as it is now.
        recorded_steps: training.steps of the attempts so far.
        completed: steps already taken.

    Raises:
        UsageError: training.steps shrinks, or the learning rate of a past step would change.
    """
    if training.steps < recorded_steps:
        raise UsageError(
            f"training.steps is {training.steps}, but this run was started with {recorded_steps}; it may only grow. "
            "Nothing was started.",
            hint="to end this attempt sooner set training.stop_after_step",
        )
    recorded = dataclasses.replace(training, steps=recorded_steps)
    before, now = _curve(optimizer, recorded), _curve(optimizer, training)
    fixed = before.last_fixed_position(now)
    if fixed is None or completed == 0 or _position(completed, optimizer, training) <= fixed:
        return
    first = 1 + bisect_right(range(1, completed + 1), fixed, key=lambda step: _position(step, optimizer, training))
    steps = f"step {first}" if first == completed else f"steps {first} to {completed}"
    last = _position(completed, optimizer, training)
    because, hint = _why_fixed(optimizer, before, now)
    raise UsageError(
        f"training.steps grows from {recorded_steps} to {training.steps}, but {because}: that would change the "
        f"learning rate of {steps}, already taken (step {completed} with {_shown(before.rate(last), now.rate(last))}). "
        "Nothing was started.",
        hint=hint,
    )


@dataclass(frozen=True, kw_only=True)
class _Curve:
    """The rate over positions, in the schedule's unit; warm-up and decay are clipped."""

    lr_schedule: str
    peak: float
    minimum: float
    warmup: int
    decay: int
    horizon: int

    def rate(self, position: int) -> float:
        """The rate at a position; beyond the horizon it stays as it ended."""
        position = min(position, self.horizon)
        if position <= self.warmup:
            return min(self.peak, self.peak * position / self.warmup)  # rounding may not lead beyond the peak
        if self.lr_schedule == "cosine":
            share = (position - self.warmup) / (self.horizon - self.warmup)
            return self._above_minimum(self.peak, (1 + math.cos(math.pi * share)) / 2)
        if position <= self.horizon - self.decay:
            return self._before_decay(position)
        top = self._before_decay(self.horizon - self.decay)
        return self._above_minimum(top, (self.horizon - position) / self.decay)

    def last_fixed_position(self, other: _Curve) -> int | None:
        """The last position at which this curve and one of a later horizon agree; None where they agree everywhere."""
        if self.horizon == other.horizon:
            return None
        if self.warmup != other.warmup:
            return 0
        if self.lr_schedule == "cosine":
            return self.warmup if self.peak > self.minimum else None
        start = self.horizon - self.decay
        return start if self.decay > 0 and self._before_decay(start) > self.minimum else None

    def _before_decay(self, position: int) -> float:
        if self.lr_schedule != "inverse_sqrt" or position <= self.warmup:
            return self.peak
        return max(self.minimum, self.peak * math.sqrt(self.warmup / position))

    def _above_minimum(self, top: float, share: float) -> float:
        """A share of the way from the minimum to top; rounding may not lead beyond the two."""
        return min(top, self.minimum + (top - self.minimum) * share)


def _curve(optimizer: OptimizerConfig, training: TrainingConfig) -> _Curve:
    in_tokens = optimizer.schedule_unit == "tokens"
    horizon = _position(training.steps, optimizer, training)
    warmup = min(optimizer.warmup_tokens if in_tokens else optimizer.warmup_steps, horizon)
    return _Curve(
        lr_schedule=optimizer.lr_schedule,
        peak=optimizer.learning_rate,
        minimum=optimizer.min_learning_rate,
        warmup=warmup,
        decay=min(optimizer.decay_tokens if in_tokens else optimizer.decay_steps, horizon - warmup),
        horizon=horizon,
    )


def _position(step: int, optimizer: OptimizerConfig, training: TrainingConfig) -> int:
    """Return the position of the schedule after a step."""
    if optimizer.schedule_unit == "steps":
        return step
    return consumed_before(step + 1, training) * training.sequence_length


def _why_fixed(optimizer: OptimizerConfig, before: _Curve, now: _Curve) -> tuple[str, str]:
    """Return the error of an extension that would change steps already taken, with the way out."""
    unit = optimizer.schedule_unit
    if before.warmup != now.warmup:
        return (
            f"optimizer.warmup_{unit} was clipped to the {before.horizon} {unit} of the run as it was recorded",
            "start a new run: choose another run.name",
        )
    if before.lr_schedule == "cosine":
        return (
            "optimizer.lr_schedule is cosine, which aims at training.steps from the end of warm-up on, so that such a "
            "run cannot be extended once it is past warm-up",
            "start a new run under another run.name; with optimizer.lr_schedule=wsd a run can be extended until its "
            "decay begins",
        )
    return (
        f"its last {before.decay} {unit} (optimizer.decay_{unit}) had begun to decay",
        f"extend before the decay begins (the last optimizer.decay_{unit}), or start a new run under another run.name",
    )


def _shown(before: float, now: float) -> str:
    """Format two rates with as many digits as distinguish them."""
    digits = next((n for n in (6, 9, 12) if f"{before:.{n}g}" != f"{now:.{n}g}"), 17)
    return f"{before:.{digits}g}, now {now:.{digits}g}"
