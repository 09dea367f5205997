"""The learning rate of each step."""

from __future__ import annotations

from megamask.config.schema.optimizer import OptimizerConfig
from megamask.errors import UsageError


def learning_rate(step: int, optimizer: OptimizerConfig, num_steps: int) -> float:
    """Warm-up, constant, linear decay (WSD; MiniCPM, arXiv:2404.06395, section 4).

    Args:
        step: 1-based number of the update.
        num_steps: training.steps, where the decay ends. Warm-up is clipped to it, the decay to what warm-up leaves.

    Returns: the rate of this update; step num_steps reaches min_learning_rate when decay_steps > 0.
    """
    warmup = min(optimizer.warmup_steps, num_steps)
    decay = min(optimizer.decay_steps, num_steps - warmup)
    if step <= warmup:
        return optimizer.learning_rate * step / warmup
    remaining = num_steps - step
    if remaining >= decay:
        return optimizer.learning_rate
    share = max(0, remaining) / decay
    return optimizer.min_learning_rate + (optimizer.learning_rate - optimizer.min_learning_rate) * share


def check_extension(optimizer: OptimizerConfig, *, recorded_steps: int, num_steps: int, completed: int) -> None:
    """Refuses a change of training.steps that would change the past.

    Args:
        recorded_steps: training.steps of the attempts so far.
        num_steps: training.steps now.
        completed: steps already taken.

    Raises:
        UsageError: training.steps shrinks, or the learning rate of a past step would change.
    """
    if num_steps < recorded_steps:
        raise UsageError(
            f"training.steps is {num_steps}, but this run was started with {recorded_steps}; it may only grow. "
            "Nothing was started.",
            hint="to end this attempt sooner set training.stop_after_step",
        )
    for step in range(1, completed + 1):
        before, now = learning_rate(step, optimizer, recorded_steps), learning_rate(step, optimizer, num_steps)
        if before != now:
            raise UsageError(
                f"training.steps grows from {recorded_steps} to {num_steps}, but that would change the learning rate "
                f"of step {step}, already taken with {before:g}, to {now:g}. Nothing was started.",
                hint="extend before the decay begins (the last optimizer.decay_steps), or start a new run",
            )
