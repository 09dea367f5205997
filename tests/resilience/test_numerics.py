from __future__ import annotations

import math
from typing import Any

import pytest

from megamask.config.schema.resilience import ResilienceConfig
from megamask.errors import ExitCode
from megamask.resilience.numerics import (
    BrokenRule,
    NumericsGuard,
    StepNumbers,
    describe,
    incident_fields,
    numerics_error,
)


@pytest.mark.parametrize(
    ("loss", "grad_norm", "expected"),
    [
        (math.nan, 1.0, "the loss is nan;"),
        (1.0, math.inf, "the gradient norm is inf;"),
        (math.nan, -math.inf, "the loss is nan and gradient norm is -inf;"),
        (1.0, 1.0, "the step is not finite;"),
    ],
)
def test_description_names_what_is_not_finite(loss: float, grad_norm: float, expected: str) -> None:
    sentence = describe(step=7, loss=loss, grad_norm=grad_norm, sample_indices=[4, 5, 6, 9])
    assert sentence == f"step 7: {expected} samples 4-6, 9"


def test_numerics_error_says_what_did_not_happen() -> None:
    error = numerics_error(step=7, loss=math.nan, grad_norm=math.nan, sample_indices=range(8))
    assert error.exit_code == ExitCode.NUMERICS
    assert "samples 0-7" in error.message
    assert "nothing was saved" in error.message
    assert "inspect" in str(error.hint)
    assert (error.incident["incident"], error.incident["sample_indices"]) == ("not_finite", list(range(8)))


def test_incident_holds_every_sample_index_while_the_sentence_stays_short() -> None:
    indices = list(range(0, 4000, 2))
    fields = incident_fields(step=1, loss=math.nan, grad_norm=0.0, sample_indices=indices)
    assert fields["sample_indices"] == indices
    assert len(fields["problem"]) < 200
    assert fields["problem"].endswith(", ...")


def settings_of(**changes: Any) -> ResilienceConfig:
    return ResilienceConfig(**{"spike": "skip", "spike_window": 4, **changes})


def steps(*losses: float, skipped: tuple[int, ...] = ()) -> list[StepNumbers]:
    return [
        StepNumbers(step=step, loss=loss, grad_norm=1.0, is_taken=step not in skipped)
        for step, loss in enumerate(losses, start=1)
    ]


def test_spike_is_a_loss_above_the_factor_times_the_median_of_the_window() -> None:
    guard = NumericsGuard(settings_of(), steps(9.0, 2.0, 3.0, 4.0, 5.0))
    assert guard.broken_rule(6, 7.0, 1.0) is None  # twice the median of 2, 3, 4, 5 is not above it
    rule = guard.broken_rule(6, 7.0000001, 1.0)
    assert rule == BrokenRule(name="loss", policy="skip", median=3.5, factor=2.0)
    assert guard.broken_rule(6, 3.0, 10.5) == BrokenRule(name="grad_norm", policy="skip", median=1.0, factor=10.0)


def test_first_steps_of_a_run_are_no_spikes_and_rules_can_be_switched_off() -> None:
    assert NumericsGuard(settings_of(), steps(1.0, 1.0, 1.0)).broken_rule(4, 99.0, 99.0) is None
    assert NumericsGuard(settings_of(), steps(1.0, 1.0, 1.0, 1.0)).broken_rule(5, 99.0, 1.0) is not None
    before = steps(1.0, 1.0, 1.0, 1.0)
    assert NumericsGuard(settings_of(spike_loss=None), before).broken_rule(5, 99.0, 1.0) is None
    assert NumericsGuard(settings_of(spike="ignore"), before).broken_rule(5, 99.0, 99.0) is None


def test_steps_without_an_update_count_in_no_median_and_are_counted_in_a_row() -> None:
    guard = NumericsGuard(settings_of(), steps(1.0, 1.0, 1.0, 9.0, 9.0, skipped=(4, 5)))
    assert guard.num_skipped_in_a_row == 2
    rule = guard.broken_rule(6, 3.0, 1.0)
    assert rule is not None
    assert rule.median == 1.0
    guard.note(StepNumbers(step=6, loss=1.0, grad_norm=1.0))
    assert guard.num_skipped_in_a_row == 0


def test_number_that_is_not_finite_is_a_fault_from_the_first_step_on() -> None:
    guard = NumericsGuard(settings_of(nonfinite="rewind"))
    for loss, norm in ((math.nan, 1.0), (1.0, math.inf)):
        assert guard.broken_rule(1, loss, norm) == BrokenRule(name="not_finite", policy="rewind")


def test_error_of_a_spike_names_the_limit() -> None:
    rule = BrokenRule(name="grad_norm", policy="stop", median=0.5, factor=10.0)
    error = numerics_error(step=7, loss=1.0, grad_norm=6.0, sample_indices=range(8), rule=rule, because="Why. ")
    assert error.message.startswith(
        "step 7: the gradient norm is 6, above 10 times 0.5, the median before it; samples 0-7. Why. "
    )
    assert error.incident["incident"] == "spike"
