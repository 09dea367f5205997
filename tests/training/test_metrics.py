"""The journal's step line: which fields, which of them are exact, how seconds add up."""

from __future__ import annotations

import time

import pytest

from megamask.data.content import batch_digest
from megamask.engine.step import StepReport
from megamask.objectives.shapes import shape_of
from megamask.training.metrics import PHASES, PhaseClock, step_record
from megamask.training.progress import Progress

PAIR = shape_of({"name": "masked", "complementary": True}, 128)


def report(**changes: object) -> StepReport:
    fields = {
        "loss": 5.5,
        "loss_terms": {"nelbo": 5.25, "z_loss": 0.25},
        "grad_norm": 1.25,
        "is_finite": True,
        "num_eligible": 1000,
        "nelbo_nats_per_token": 5.25,
        "scored_tokens": 960,
        "masked_tokens": 480,
        "masked_tokens_by_noise_level": [960, *(0 for _ in range(9))],
        "loss_by_noise_level": [6.0, *(None for _ in range(9))],
        "content_sum": 2**64 - 1,
        "forward_backward_s": 0.25,
        "optimizer_s": 0.125,
    }
    return StepReport(**{**fields, **changes})  # type: ignore[arg-type]


def progress() -> Progress:
    made = Progress(num_views=2)
    for _ in range(3):
        made.advance(global_batch_size=8, num_eligible=1000, loss=2.0)
    return made


def test_record_has_the_fields_of_the_format() -> None:
    fields = step_record(
        progress(), report(), learning_rate=1e-3, clock=PhaseClock(), shape=PAIR, global_batch_size=8
    ).fields
    assert set(fields) == {
        *("step", "loss", "loss_terms", "nelbo_nats_per_token", "grad_norm", "learning_rate"),
        *("global_batch_size", "consumed_samples", "consumed_tokens", "processed_tokens", "masked_tokens"),
        *("loss_by_noise_level", "masked_tokens_by_noise_level"),
        *("batch_digest", "content_digest", "seconds", "tokens_per_second", "mfu", "peak_memory_bytes"),
    }
    assert (fields["step"], fields["consumed_samples"]) == (3, 24)
    assert (fields["consumed_tokens"], fields["processed_tokens"]) == (3000, 6000)
    assert fields["content_digest"] == "f" * 16
    assert fields["batch_digest"] == batch_digest(16, 8)
    assert fields["loss"] == sum(fields["loss_terms"].values()) == 5.5
    assert fields["nelbo_nats_per_token"] == fields["loss_terms"]["nelbo"] == 5.25
    assert fields["loss_by_noise_level"][:2] == [6.0, None]
    assert sum(fields["masked_tokens_by_noise_level"]) == 960


def test_utilisation_is_unknown_where_the_peak_is_unknown() -> None:
    record = step_record(progress(), report(), learning_rate=1e-3, clock=PhaseClock(), shape=PAIR, global_batch_size=8)
    assert record.fields["mfu"] is None


def test_record_of_a_smaller_batch_counts_its_own_samples() -> None:
    """Within a batch-size ramp; the settings know only the last level."""
    clock = PhaseClock()
    clock.lap_step(report())
    fields = step_record(
        progress(),
        report(),
        learning_rate=1e-3,
        clock=clock,
        shape=PAIR,
        global_batch_size=4,
        peak_seconds_per_token=1e-5,
    ).fields
    assert fields["global_batch_size"] == 4
    assert fields["batch_digest"] == batch_digest(20, 4)
    assert fields["mfu"] == pytest.approx(2 * 4 * 128 * 1e-5 / sum(fields["seconds"].values()), rel=1e-3)


def test_utilisation_counts_every_processed_token() -> None:
    clock = PhaseClock()
    clock.lap("data")
    clock.lap_step(report())
    fields = step_record(
        progress(),
        report(),
        learning_rate=1e-3,
        clock=clock,
        shape=PAIR,
        global_batch_size=8,
        peak_seconds_per_token=1e-5,
    ).fields
    total = sum(fields["seconds"].values())
    assert fields["mfu"] == pytest.approx(2 * 8 * 128 * 1e-5 / total, rel=1e-3)


def test_clock_gives_every_moment_to_one_phase() -> None:
    started = time.monotonic()
    clock = PhaseClock()
    time.sleep(0.02)
    clock.lap("data")
    time.sleep(0.03)
    clock.lap_step(report(forward_backward_s=0.01, optimizer_s=0.005))
    seconds = clock.take()
    assert tuple(seconds) == PHASES
    assert seconds["forward_backward"] == pytest.approx(0.01)
    assert seconds["optimizer"] == pytest.approx(0.005)
    assert seconds["data"] >= 0.02
    assert seconds["data"] + seconds["other"] + 0.015 <= time.monotonic() - started + 1e-3


def test_clock_starts_over_after_each_record() -> None:
    clock = PhaseClock()
    time.sleep(0.01)
    clock.lap("other")
    assert clock.take()["other"] > 0
    assert clock.take() == dict.fromkeys(PHASES, 0.0)
