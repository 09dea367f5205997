"""Schedules and times: endpoints, derivatives, strata, and the law to the bit."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.diffusion.philox import run_key
from megamask.diffusion.schedule import EPS, noise_schedule, stratified_times, threshold
from megamask.errors import UsageError
from support import noise_oracle

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "noise_v1.json").read_text())
NAMES = ("linear", "cosine_md4", "cosine_bd3")
SEED = st.integers(0, 2**64 - 1)
STEP = st.integers(1, 2**63)


@pytest.mark.parametrize("name", NAMES)
def test_mask_probability_rises_from_eps_to_one_minus_eps(name: str) -> None:
    schedule = noise_schedule(name)
    values = [schedule.mask_probability(k / 1000) for k in range(1001)]
    assert values[0] == EPS
    assert values[-1] == pytest.approx(1 - EPS, abs=1e-15)
    assert all(a < b for a, b in itertools.pairwise(values))


@pytest.mark.parametrize("name", NAMES)
@given(t=st.floats(0.001, 0.999))
def test_derivative_is_that_of_the_mask_probability(name: str, t: float) -> None:
    schedule, step = noise_schedule(name), 1e-6
    slope = (schedule.mask_probability(t + step) - schedule.mask_probability(t - step)) / (2 * step)
    assert schedule.derivative(t) == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_the_two_cosines_curve_in_opposite_ways() -> None:
    md4, linear, bd3 = (noise_schedule(name).mask_probability(0.5) for name in ("cosine_md4", "linear", "cosine_bd3"))
    assert md4 == pytest.approx(EPS + (1 - 2 * EPS) * math.sqrt(0.5))
    assert bd3 == pytest.approx(EPS + (1 - 2 * EPS) * (1 - math.sqrt(0.5)))
    assert bd3 < linear < md4


def test_unknown_schedule_is_refused_with_the_allowed_names() -> None:
    with pytest.raises(
        UsageError, match=r"objective\.noise_schedule is 'cosine'; allowed: linear, cosine_md4, cosine_bd3"
    ):
        noise_schedule("cosine")


@pytest.mark.promise("noise levels are stratified over the batch")
@given(seed=SEED, step=STEP, size=st.integers(1, 300))
def test_stratified_times_put_exactly_one_time_in_each_stratum(seed: int, step: int, size: int) -> None:
    made = stratified_times(step, size, run_key(seed))
    assert all(0 <= t < 1 for t in made)
    assert sorted(math.floor(Fraction(t) * size) for t in made) == list(range(size))


@given(seed=SEED, step=STEP, size=st.integers(1, 50))
def test_stratified_times_equal_the_oracle(seed: int, step: int, size: int) -> None:
    assert stratified_times(step, size, run_key(seed)) == noise_oracle.times(seed, step, size)


def test_stratified_times_stay_below_one_when_u_is_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    import megamask.diffusion.schedule as module

    monkeypatch.setattr(module, "philox4x32", lambda counter, key: (2**32 - 1,) * 4)
    for size in (1, 2, 3, 7, 4096):
        made = stratified_times(1, size, (0, 0))
        assert all(0 <= t < 1 for t in made)
        assert made[0] == 1 - 2**-53


@pytest.mark.parametrize("case", GOLDEN["times"], ids=lambda case: f"step {case['step']}")
def test_stratified_times_equal_the_golden_integers(case: dict[str, int]) -> None:
    (first,) = stratified_times(case["step"], 1, run_key(int(case["seed"])))
    assert first * 2**53 == case["u_times_2_53"]


@pytest.mark.parametrize(("step", "size"), [(0, 4), (1, 0)])
def test_stratified_times_refuse_a_step_or_batch_below_one(step: int, size: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        stratified_times(step, size, (0, 0))


@given(p=st.floats(0, 1))
def test_threshold_is_the_exact_floor(p: float) -> None:
    assert threshold(p) == math.floor(Fraction(p) * 2**32)


@pytest.mark.parametrize("name", NAMES)
def test_thresholds_equal_the_golden_integers(name: str) -> None:
    schedule = noise_schedule(name)
    assert [threshold(schedule.mask_probability(k / 16)) for k in range(16)] == GOLDEN["thresholds_at_sixteenths"][name]
