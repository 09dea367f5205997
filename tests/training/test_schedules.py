"""The learning rate: warm-up, constant, decay, clipping, and which extensions keep the past."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.config.schema.optimizer import OptimizerConfig
from megamask.errors import UsageError
from megamask.training.schedules import check_extension, learning_rate


def optimizer(**settings: float) -> OptimizerConfig:
    return OptimizerConfig(**{"learning_rate": 1.0, **settings})  # type: ignore[arg-type]


def rates(config: OptimizerConfig, steps: int) -> list[float]:
    return [learning_rate(step, config, steps) for step in range(1, steps + 1)]


def test_rate_rises_stays_and_falls() -> None:
    config = optimizer(warmup_steps=2, decay_steps=4, min_learning_rate=0.2)
    assert rates(config, 8) == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_rate_is_constant_after_warmup_without_decay() -> None:
    assert rates(optimizer(warmup_steps=3), 6) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])


@given(steps=st.integers(1, 50), warmup=st.integers(0, 80), decay=st.integers(0, 80), minimum=st.floats(0, 1))
def test_rate_is_positive_and_bounded_for_any_number_of_steps(
    steps: int, warmup: int, decay: int, minimum: float
) -> None:
    config = optimizer(warmup_steps=warmup, decay_steps=decay, min_learning_rate=minimum)
    values = rates(config, steps)
    assert all(0 <= value <= 1 for value in values)
    assert max(values) == 1 or decay >= steps - min(warmup, steps)
    if min(decay, steps - min(warmup, steps)) > 0:
        assert values[-1] == pytest.approx(minimum)


def test_extension_is_allowed_before_the_decay_begins() -> None:
    check_extension(optimizer(warmup_steps=5, decay_steps=10), recorded_steps=50, num_steps=80, completed=40)


def test_extension_is_refused_when_a_past_step_would_change() -> None:
    with pytest.raises(UsageError, match="learning rate of step 41"):
        check_extension(optimizer(decay_steps=10), recorded_steps=50, num_steps=80, completed=41)


def test_shrinking_is_refused_and_names_the_other_key() -> None:
    with pytest.raises(UsageError, match="may only grow") as error:
        check_extension(optimizer(), recorded_steps=50, num_steps=49, completed=0)
    assert "training.stop_after_step" in str(error.value)


def test_clipped_warmup_counts_as_a_past_that_would_change() -> None:
    with pytest.raises(UsageError, match="learning rate of step 1"):
        check_extension(optimizer(warmup_steps=10), recorded_steps=5, num_steps=20, completed=5)
