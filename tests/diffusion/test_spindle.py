"""The spindle schedule against its formula, token by token in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from megamask.diffusion.philox import Purpose, uniform_words
from megamask.diffusion.schedule import EPS
from megamask.diffusion.spindle import corrupt_by_information, token_information

KEY, LENGTH, STRENGTH = (5, 9), 12, 0.3
COUNTS = [1000, 400, 90, 9, 0]


def noised(times: list[float], *, complementary: bool = True):
    generator = torch.Generator().manual_seed(1)
    x_0 = torch.randint(0, 5, (len(times), LENGTH), generator=generator)
    is_eligible = torch.arange(LENGTH).expand_as(x_0) < 10
    made = corrupt_by_information(
        x_0,
        is_eligible,
        torch.arange(len(times)),
        times,
        information=token_information(COUNTS),
        strength=STRENGTH,
        complementary=complementary,
        mask_token_id=99,
        key=KEY,
    )
    return x_0, is_eligible, made


def probability(row: list[int], place: int, t: float) -> float:
    total = sum(COUNTS) + len(COUNTS)
    of = [math.log(total / (COUNTS[token] + 1)) for token in row]
    h = 1 - sum(of[:10]) / 10 / of[place]
    h = max(-1 / (math.pi * STRENGTH), min(1 / (math.pi * STRENGTH), h))
    return EPS + (1 - 2 * EPS) * (t + STRENGTH * math.sin(math.pi * t) * h)


@pytest.mark.promise("the spindle schedule masks by the information of each token, as DiffusionBERT's formula does")
def test_each_token_has_its_own_probability_and_weight() -> None:
    times = [0.0, 0.1, 0.5, 0.8, 0.999]
    x_0, is_eligible, made = noised(times)
    words = uniform_words(torch.arange(len(times)), LENGTH, purpose=Purpose.MASK, key=KEY)
    for row, t in enumerate(times):
        for i in range(LENGTH):
            p = probability(x_0[row].tolist(), i, t)
            slope = (probability(x_0[row].tolist(), i, t + 1e-6) - probability(x_0[row].tolist(), i, t - 1e-6)) / 2e-6
            first, second = made.is_masked[2 * row, i], made.is_masked[2 * row + 1, i]
            assert bool(first) == (bool(is_eligible[row, i]) and int(words[row, i]) < p * 2**32)
            assert bool(first ^ second) == bool(is_eligible[row, i])
            assert float(made.weight[2 * row, i]) == pytest.approx(slope / p, rel=2e-3, abs=1e-4)
            assert float(made.weight[2 * row + 1, i]) == pytest.approx(slope / (1 - p), rel=2e-3, abs=1e-4)
    assert torch.equal(made.x_t == 99, made.is_masked)


def test_rare_tokens_are_masked_before_frequent_ones() -> None:
    row = [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 0, 0]
    for t in (0.2, 0.5, 0.8):
        rising = [probability(row, place, t) for place in range(5)]
        assert rising == sorted(rising) and rising[0] < t < rising[4]
    information = token_information(COUNTS).tolist()
    assert information == sorted(information)
