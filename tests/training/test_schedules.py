"""The learning rate: four schedules against an oracle, their ends, joints and bounds; which extensions it allows."""

from __future__ import annotations

import dataclasses
import math
import re
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megamask.config.schema.optimizer import OptimizerConfig
from megamask.config.schema.training import TrainingConfig
from megamask.errors import UsageError
from megamask.training.schedules import check_extension, learning_rate

SCHEDULES = ("constant", "wsd", "cosine", "inverse_sqrt")
RAMP = {"batch_size_ramp_start": 2, "batch_size_ramp_increment": 3, "batch_size_ramp_samples": 40}


def optimizer(**settings: Any) -> OptimizerConfig:
    return OptimizerConfig(**{"learning_rate": 1.0, **settings})


def training(steps: int, **more: Any) -> TrainingConfig:
    return TrainingConfig(**{"steps": steps, "global_batch_size": 8, "sequence_length": 16, **more})


def rates(config: OptimizerConfig, run: TrainingConfig | int) -> list[float]:
    run = training(run) if isinstance(run, int) else run
    return [learning_rate(step, config, run) for step in range(1, run.steps + 1)]


def positions(config: OptimizerConfig, run: TrainingConfig) -> list[int]:
    """After each step of the run; tokens by counting samples one batch after the other."""
    if config.schedule_unit == "steps":
        return list(range(1, run.steps + 1))
    tokens, size, used, found = 0, run.batch_size_ramp_start or run.global_batch_size, 0, []
    for _ in range(run.steps):
        tokens, used = tokens + size * run.sequence_length, used + size
        found.append(tokens)
        if size < run.global_batch_size:
            share = Fraction(run.batch_size_ramp_samples, (run.global_batch_size - 2) // run.batch_size_ramp_increment)
            if used >= share:
                size, used = size + run.batch_size_ramp_increment, 0
    return found


def oracle(config: OptimizerConfig, run: TrainingConfig) -> list[float]:
    """The definitions of docs/architecture.md, written once more: lines in fractions, curves by other formulas."""
    places = positions(config, run)
    horizon = places[-1]
    given_warmup, given_decay = (
        (config.warmup_steps, config.decay_steps)
        if config.schedule_unit == "steps"
        else (config.warmup_tokens, config.decay_tokens)
    )
    warmup = min(given_warmup, horizon)
    decay = min(given_decay, horizon - warmup)
    peak, minimum = Fraction(config.learning_rate), Fraction(config.min_learning_rate)

    def plateau(x: int) -> Fraction:
        if config.lr_schedule != "inverse_sqrt":
            return peak
        return max(minimum, peak * Fraction((warmup / x) ** 0.5))

    def rate(x: int) -> Fraction:
        if x <= warmup:
            return peak * Fraction(x, warmup)
        if config.lr_schedule == "cosine":
            half_angle = math.pi * (x - warmup) / (2 * (horizon - warmup))
            return minimum + (peak - minimum) * Fraction(math.cos(half_angle) ** 2)
        knee = horizon - decay
        if x <= knee:
            return plateau(x)
        top = plateau(knee) if knee > 0 else peak
        return top - (top - minimum) * Fraction(x - knee, decay)

    return [float(rate(x)) for x in places]


@st.composite
def schedules(draw: st.DrawFn) -> tuple[OptimizerConfig, TrainingConfig]:
    """Every combination that the config allows, with lengths that reach beyond the run, and a ramp or none."""
    course, unit = draw(st.sampled_from(SCHEDULES)), draw(st.sampled_from(("steps", "tokens")))
    steps, scale = draw(st.integers(1, 50)), 1 if unit == "steps" else 100
    warmup = draw(st.integers(1 if course == "inverse_sqrt" else 0, 70 * scale))
    decay = draw(st.integers(0, 70 * scale)) if course in ("wsd", "inverse_sqrt") else 0
    peak = draw(st.floats(1e-6, 10))
    falls = course in ("cosine", "inverse_sqrt") or decay > 0
    settings = {
        "learning_rate": peak,
        "lr_schedule": course,
        "schedule_unit": unit,
        f"warmup_{unit}": warmup,
        f"decay_{unit}": decay,
        "min_learning_rate": draw(st.floats(0, peak)) if falls else 0.0,
    }
    return optimizer(**settings), training(steps, **(RAMP if draw(st.booleans()) else {}))


@pytest.mark.promise("the learning rate follows its definition, by steps or tokens, with and without a ramp")
@given(schedules())
def test_rates_equal_the_oracle(case: tuple[OptimizerConfig, TrainingConfig]) -> None:
    assert rates(*case) == pytest.approx(oracle(*case), rel=1e-12, abs=1e-15)


@pytest.mark.promise("the learning rate rises to the peak, then never rises, and stays within its bounds")
@given(schedules())
def test_rate_rises_to_the_peak_then_never_rises_and_stays_within_its_bounds(
    case: tuple[OptimizerConfig, TrainingConfig],
) -> None:
    config, _ = case
    values, places = rates(*case), positions(*case)
    warmup = min(config.warmup_steps + config.warmup_tokens, places[-1])
    during = [value for value, x in zip(values, places, strict=True) if x <= warmup]
    after = [value for value, x in zip(values, places, strict=True) if x > warmup]
    assert during == sorted(during)
    assert after == sorted(after, reverse=True)
    assert all(0 < value <= config.learning_rate for value in during)
    assert all(config.min_learning_rate <= value <= config.learning_rate for value in after)


@pytest.mark.promise("a decaying schedule ends at exactly its minimum")
@given(schedules())
def test_falling_schedule_ends_at_exactly_its_minimum(case: tuple[OptimizerConfig, TrainingConfig]) -> None:
    config, _ = case
    last = positions(*case)[-1]
    assume(last > config.warmup_steps + config.warmup_tokens)
    if config.lr_schedule == "cosine" or config.decay_steps + config.decay_tokens > 0:
        assert rates(*case)[-1] == config.min_learning_rate
    if config.lr_schedule == "constant":
        assert rates(*case)[-1] == config.learning_rate


@pytest.mark.promise("a schedule is continuous where its pieces meet")
@pytest.mark.parametrize("course", SCHEDULES)
def test_schedule_is_continuous_at_its_joints(course: str) -> None:
    """No step changes the rate by more than the steepest slope of a smooth piece, here twice the peak over a length."""
    lengths = {"warmup_steps": 2000, "decay_steps": 3000 if course in ("wsd", "inverse_sqrt") else 0}
    values = [0.0, *rates(optimizer(lr_schedule=course, **lengths), 10_000)]
    assert max(abs(one - two) for one, two in pairwise(values)) <= 2 / 2000
    assert values[2000] == 1


@pytest.mark.promise("tokens and steps are one schedule when the batch is constant")
@pytest.mark.parametrize("course", SCHEDULES)
def test_tokens_and_steps_give_the_same_schedule_when_the_batch_is_constant(course: str) -> None:
    """B samples of L tokens a step: x tokens = B * L * steps, and the rate knows ratios only."""
    decay = 7 if course in ("wsd", "inverse_sqrt") else 0
    minimum = 0.0 if course == "constant" else 0.125
    by_steps = optimizer(lr_schedule=course, warmup_steps=5, decay_steps=decay, min_learning_rate=minimum)
    by_tokens = optimizer(
        lr_schedule=course,
        schedule_unit="tokens",
        warmup_tokens=5 * 8 * 16,
        decay_tokens=decay * 8 * 16,
        min_learning_rate=minimum,
    )
    assert rates(by_tokens, 30) == pytest.approx(rates(by_steps, 30), rel=1e-15)


def test_token_schedule_moves_with_the_samples_of_a_ramp() -> None:
    """Levels of 2, 5 and 8 samples, 20 samples each below the last: 10 steps of 2, 4 of 5."""
    config = optimizer(lr_schedule="constant", schedule_unit="tokens", warmup_tokens=16 * 40)
    values = rates(config, training(16, **RAMP))
    assert values[:10] == pytest.approx([2 * step / 40 for step in range(1, 11)])
    assert values[10:] == pytest.approx([25 / 40, 30 / 40, 35 / 40, 1, 1, 1])


def test_wsd_rises_stays_and_falls() -> None:
    config = optimizer(warmup_steps=2, decay_steps=4, min_learning_rate=0.2)
    assert rates(config, 8) == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_rate_is_constant_after_warmup_without_decay() -> None:
    for course in ("wsd", "constant"):
        assert rates(optimizer(lr_schedule=course, warmup_steps=3), 6) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])


def test_cosine_is_halfway_in_the_middle() -> None:
    values = rates(optimizer(lr_schedule="cosine", warmup_steps=2, min_learning_rate=0.5), 10)
    assert values[1] == 1
    assert values[5] == pytest.approx(0.75)
    assert values[9] == 0.5


@pytest.mark.promise("the learning rate rises to the peak, then never rises, and stays within its bounds")
def test_rounding_leads_no_rate_above_the_peak() -> None:
    """minimum + (peak - minimum) is above the peak here, and so close to warm-up the cosine is 1."""
    config = optimizer(lr_schedule="cosine", learning_rate=0.0004, min_learning_rate=0.00012647867980863738)
    assert learning_rate(1, config, training(10**9)) == 0.0004
    peak = 7.319671642641332  # * 9 / 9 is above it
    assert learning_rate(9, optimizer(learning_rate=peak, warmup_steps=9), training(20)) == peak


def test_inverse_square_root_halves_when_the_position_is_four_warmups() -> None:
    config = optimizer(lr_schedule="inverse_sqrt", warmup_steps=4, min_learning_rate=0.4, decay_steps=8)
    values = rates(config, 48)
    assert values[3] == 1
    assert values[15] == pytest.approx(0.5)
    assert values[35] == 0.4  # sqrt(4 / 36) would be below the minimum
    assert values[47] == 0.4


def refused(config: OptimizerConfig, run: TrainingConfig, *, more: int, completed: int) -> str | None:
    try:
        longer = dataclasses.replace(run, steps=run.steps + more)
        check_extension(config, longer, recorded_steps=run.steps, completed=completed)
    except UsageError as error:
        return error.message
    return None


@pytest.mark.promise("an extension is refused exactly when it would change a past learning rate")
@given(schedules(), st.integers(0, 60), st.integers(0, 40))
def test_extension_that_is_allowed_changes_no_past_rate(
    case: tuple[OptimizerConfig, TrainingConfig], completed: int, more: int
) -> None:
    """Bit for bit, one step after the other; where it is refused, the steps before the named one are the same too."""
    config, run = case
    completed = min(completed, run.steps)
    message = refused(config, run, more=more, completed=completed)
    first = completed + 1 if message is None else int(re.search(r"learning rate of steps? (\d+)", message)[1])
    assert 1 <= first <= completed + 1
    longer = dataclasses.replace(run, steps=run.steps + more)
    assert rates(config, run)[: first - 1] == rates(config, longer)[: first - 1]


@pytest.mark.promise("an extension is refused exactly when it would change a past learning rate")
@given(
    course=st.sampled_from(("constant", "wsd", "cosine")),
    warmup=st.integers(0, 60),
    decay=st.integers(0, 60),
    minimum=st.sampled_from((0.0, 0.125, 1.0)),
    steps=st.integers(1, 50),
    completed=st.integers(1, 50),
    more=st.integers(1, 40),
)
def test_extension_is_refused_only_when_a_past_rate_changes(
    course: str, warmup: int, decay: int, minimum: float, steps: int, completed: int, more: int
) -> None:
    config = optimizer(
        lr_schedule=course,
        warmup_steps=warmup,
        decay_steps=decay if course == "wsd" else 0,
        min_learning_rate=0.0 if course == "constant" else minimum,
    )
    completed = min(completed, steps)
    if refused(config, training(steps), more=more, completed=completed) is not None:
        assert rates(config, training(steps))[:completed] != rates(config, training(steps + more))[:completed]


@given(warmup=st.integers(1, 20), decay=st.integers(0, 30), steps=st.integers(20, 50), completed=st.integers(0, 50))
def test_inverse_square_root_can_be_extended_until_its_decay_begins(
    warmup: int, decay: int, steps: int, completed: int
) -> None:
    config = optimizer(lr_schedule="inverse_sqrt", warmup_steps=warmup, decay_steps=decay)
    completed = min(completed, steps)
    message = refused(config, training(steps), more=7, completed=completed)
    assert (message is None) == (decay == 0 or completed <= max(warmup, steps - decay))


@pytest.mark.parametrize("settings", [{"lr_schedule": "cosine"}, {"decay_steps": 10}])
def test_extension_is_always_allowed_when_the_minimum_is_the_peak(settings: dict[str, Any]) -> None:
    assert refused(optimizer(min_learning_rate=1.0, **settings), training(50), more=30, completed=50) is None


@pytest.mark.promise("a cosine run can be extended until warm-up ends and never after")
@pytest.mark.parametrize("completed", range(51))
def test_cosine_can_be_extended_until_warmup_ends_and_never_after(completed: int) -> None:
    config = optimizer(lr_schedule="cosine", warmup_steps=10)
    if completed <= 10:
        check_extension(config, training(80), recorded_steps=50, completed=completed)
        return
    with pytest.raises(UsageError) as error:
        check_extension(config, training(80), recorded_steps=50, completed=completed)
    assert "optimizer.lr_schedule is cosine" in error.value.message
    assert "cannot be extended once it is past warm-up" in error.value.message
    assert error.value.message.endswith("Nothing was started.")


def test_extension_is_allowed_before_the_decay_begins() -> None:
    config = optimizer(warmup_steps=5, decay_steps=10)
    check_extension(config, training(80), recorded_steps=50, completed=40)


@pytest.mark.promise("a change of training.steps that would change a past learning rate is refused")
def test_extension_is_refused_when_a_past_step_would_change() -> None:
    with pytest.raises(UsageError, match=r"learning rate of step 41, already taken \(step 41 with 0.9, now 1\)"):
        check_extension(optimizer(decay_steps=10), training(80), recorded_steps=50, completed=41)
    with pytest.raises(UsageError, match=r"learning rate of steps 41 to 43, already taken \(step 43 with 0.7, now 1\)"):
        check_extension(optimizer(decay_steps=10), training(80), recorded_steps=50, completed=43)


def test_shrinking_is_refused_and_names_the_other_key() -> None:
    with pytest.raises(UsageError, match="may only grow") as error:
        check_extension(optimizer(), training(49), recorded_steps=50, completed=0)
    assert "training.stop_after_step" in str(error.value)


def test_clipped_warmup_counts_as_a_past_that_would_change() -> None:
    with pytest.raises(UsageError, match=r"optimizer\.warmup_steps was clipped.*learning rate of steps 1 to 5"):
        check_extension(optimizer(warmup_steps=10), training(20), recorded_steps=5, completed=5)


def test_extension_of_a_long_run_is_decided_without_going_through_its_steps() -> None:
    """One by one, 10^12 steps would run into the test's time limit."""
    config = optimizer(schedule_unit="tokens", decay_tokens=10**9)
    check_extension(config, training(2 * 10**12, **RAMP), recorded_steps=10**12, completed=9 * 10**11)
    with pytest.raises(UsageError, match="to 1000000000000, already taken"):
        check_extension(config, training(2 * 10**12, **RAMP), recorded_steps=10**12, completed=10**12)
