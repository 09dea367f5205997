"""The batch-size ramp: the closed form against counting one step after the other."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.config.schema.training import TrainingConfig
from megamask.training.batch_size import batch_size_at, consumed_before


def training(
    size: int, start: int | None = None, increment: int | None = None, samples: int | None = None, **more: int
):
    ramp = {"batch_size_ramp_start": start, "batch_size_ramp_increment": increment, "batch_size_ramp_samples": samples}
    return TrainingConfig(**{"steps": 100, "sequence_length": 16, "global_batch_size": size, **ramp, **more})


@st.composite
def ramps(draw: st.DrawFn) -> TrainingConfig:
    start, increment, count = draw(st.integers(1, 12)), draw(st.integers(1, 9)), draw(st.integers(1, 6))
    return training(start + count * increment, start, increment, draw(st.integers(1, 400)))


def simulate(config: TrainingConfig, steps: int) -> list[tuple[int, int]]:
    """(first sample index, size) of each step: a level gives batches until its share of the samples is used up."""
    size, start = config.global_batch_size, config.batch_size_ramp_start
    share = Fraction(config.batch_size_ramp_samples, (size - start) // config.batch_size_ramp_increment)
    batches, consumed, level, used = [], 0, start, 0
    while len(batches) < steps:
        batches.append((consumed, level))
        consumed, used = consumed + level, used + level
        if level < size and used >= share:
            level, used = level + config.batch_size_ramp_increment, 0
    return batches


@pytest.mark.promise("a step's first sample and size have a closed form")
@given(ramps())
def test_closed_form_equals_counting_step_by_step(config: TrainingConfig) -> None:
    for step, (first, size) in enumerate(simulate(config, 200), start=1):
        assert (consumed_before(step, config), batch_size_at(first, config)) == (first, size)


@pytest.mark.promise("a growing batch uses every sample index once, in order")
@given(ramps())
def test_steps_cover_every_sample_index_once(config: TrainingConfig) -> None:
    indices = []
    for step in range(1, 60):
        first = consumed_before(step, config)
        indices += range(first, first + batch_size_at(first, config))
    assert indices == list(range(len(indices)))


@given(ramps())
def test_every_level_is_met_in_order_and_the_last_one_stays(config: TrainingConfig) -> None:
    horizon = config.batch_size_ramp_samples + sum(range(config.global_batch_size + 1))
    sizes = [batch_size_at(consumed, config) for consumed in range(horizon)]
    levels = list(range(config.batch_size_ramp_start, config.global_batch_size + 1, config.batch_size_ramp_increment))
    assert list(dict.fromkeys(sizes)) == levels
    assert sizes == sorted(sizes)
    assert batch_size_at(10**15, config) == config.global_batch_size


@given(ramps(), st.integers(0, 500))
def test_sample_inside_a_batch_has_the_size_of_that_batch(config: TrainingConfig, step: int) -> None:
    first = consumed_before(step + 1, config)
    size = batch_size_at(first, config)
    assert {batch_size_at(sample, config) for sample in range(first, first + size)} == {size}


@given(size=st.integers(1, 10**6), step=st.integers(1, 10**9))
def test_batch_is_constant_without_a_ramp(size: int, step: int) -> None:
    assert consumed_before(step, training(size)) == (step - 1) * size
    assert batch_size_at((step - 1) * size, training(size)) == size


def test_levels_share_the_samples_and_round_up_to_whole_batches() -> None:
    config = training(16, 4, 4, 60)  # three levels of 20 samples: 5 batches of 4, 3 of 8, 2 of 12
    sizes = [size for _, size in simulate(config, 12)]
    assert sizes == [4] * 5 + [8] * 3 + [12] * 2 + [16] * 2
    assert [consumed_before(step, config) for step in (1, 6, 9, 11, 12)] == [0, 20, 44, 68, 84]


@pytest.mark.parametrize("step", [0, -3])
def test_step_before_the_first_is_an_error(step: int) -> None:
    with pytest.raises(ValueError, match="steps count from 1"):
        consumed_before(step, training(4))


def test_negative_position_is_an_error() -> None:
    with pytest.raises(ValueError, match="consumed_samples is -1"):
        batch_size_at(-1, training(4))
