"""Masks of masked diffusion: exact counts, importance sampling of the noise level, random lengths, documents.

The bound of a made-up model is computed by summing over all masks of a short row; each way of drawing must find it.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from megamask.diffusion.schedule import EPS, least_variance_schedule, threshold
from megamask.objectives.base import Rows, Samples
from support.model_documents import model_document
from support.objectives import masked_objective

VOCABULARY = model_document().vocabulary
KEY, N = (7, 0), 5


def given(count: int, length: int = N, eligible: int = N) -> Samples:
    place = torch.arange(length).expand(count, length)
    return Samples(
        tokens=torch.full((count, length), 3),
        is_eligible=place < eligible,
        sample_index=torch.arange(count),
        batch_position=list(range(count)),
        global_batch_size=count,
    )


def cost(is_masked: torch.Tensor) -> torch.Tensor:
    """A made-up cross entropy [r, s] that depends on the place and on everything that is masked."""
    place = torch.arange(is_masked.size(1), dtype=torch.float64)
    seen = (is_masked.double() * (place + 1)).sum(dim=1, keepdim=True)
    return 1 + place / 3 + seen.sqrt()


def nelbo() -> float:
    """(1/n) sum over k of n/k E[sum of masked cost], from every mask of n places, per token."""
    total = 0.0
    for k in range(1, N + 1):
        masks = [torch.tensor([[i in chosen for i in range(N)]]) for chosen in itertools.combinations(range(N), k)]
        total += math.fsum(float((cost(m) * m).sum()) for m in masks) / len(masks) / k
    return total / N


def estimate(rows: Rows, samples: Samples, num_views: int) -> float:
    values = rows.weight.double() * cost(rows.is_scored) * rows.is_scored
    return float(values.sum()) / (int(samples.is_eligible.sum()) * num_views)


@pytest.mark.promise("exact-count masks estimate the bound without bias, with one view and with the pair")
@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "cosine_bd3", "sqrt"])
def test_exact_counts_find_the_bound_of_all_masks(schedule: str, complementary: bool) -> None:
    objective = masked_objective(VOCABULARY, noise_schedule=schedule, mask_counts="exact", complementary=complementary)
    samples = given(40_000)
    rows, views = objective.rows(samples, 1, KEY), 2 if complementary else 1
    # stratified over 40,000 levels; what is left is which tokens are masked: a bound of 2 % lies 8 deviations away
    assert estimate(rows, samples, views) == pytest.approx(nelbo(), rel=0.02)
    if complementary:
        both = rows.is_scored.reshape(-1, 2, N)
        assert torch.equal(both[:, 0] ^ both[:, 1], samples.is_eligible)
    counts = rows.is_scored[::views].sum(dim=1)
    if schedule == "linear":
        assert torch.bincount(counts, minlength=N + 1).tolist() == pytest.approx([0, *[8000] * N], abs=2)


@pytest.mark.parametrize("complementary", [False, True])
def test_importance_sampling_finds_the_bound_of_independent_masks(complementary: bool) -> None:
    objective = masked_objective(VOCABULARY, time_sampling="importance", complementary=complementary)
    samples = given(50_000)  # the spread of the estimate is 0.4 %
    rows = objective.rows(samples, 1, KEY)
    masks = [torch.tensor([bits]) for bits in itertools.product([False, True], repeat=N)]
    expected, steps = 0.0, 20_000
    for step in range(steps):  # the integral over p from EPS to 1 - EPS
        p = EPS + (1 - 2 * EPS) * (step + 0.5) / steps
        weights = [p ** (k - 1) * (1 - p) ** (N - k) for k in range(N + 1)]
        expected += (1 - 2 * EPS) / steps * math.fsum(weights[k] * total for k, total in _totals(masks))
    assert estimate(rows, samples, 2 if complementary else 1) == pytest.approx(expected / N, rel=0.03)


def _totals(masks: list[torch.Tensor], kept: dict[int, float] = {}) -> list[tuple[int, float]]:  # noqa: B006 - a cache
    if not kept:
        for mask in masks:
            k = int(mask.sum())
            kept[k] = kept.get(k, 0.0) + float((cost(mask) * mask).sum())
    return list(kept.items())


def test_importance_density_has_the_least_second_moment_of_three() -> None:
    n = 64

    def second_moment(density) -> float:
        steps = 100_000
        grid = [EPS + (1 - 2 * EPS) * (i + 0.5) / steps for i in range(steps)]
        values = [density(p) for p in grid]
        total = math.fsum(values)
        return math.fsum((1 + (1 - p) / (n * p)) / (q / total) for p, q in zip(grid, values, strict=True)) / steps**2

    best = second_moment(lambda p: math.sqrt((1 + (n - 1) * p) / (n * p)))
    assert best < second_moment(lambda p: 1.0)
    assert best < second_moment(lambda p: 1 / p)
    schedule = least_variance_schedule(n)
    for t in (0.01, 0.3, 0.9):
        p = schedule.mask_probability(t)
        slope = (schedule.mask_probability(t + 1e-6) - schedule.mask_probability(t - 1e-6)) / 2e-6
        assert schedule.derivative(t) == pytest.approx(slope, rel=1e-4)
        assert schedule.derivative(t) * math.sqrt((1 + (n - 1) * p) / p) == pytest.approx(
            schedule.derivative(0.5) * math.sqrt((1 + (n - 1) * (q := schedule.mask_probability(0.5))) / q)
        )
    assert threshold(schedule.mask_probability(0.0)) == threshold(EPS)


def test_random_lengths_cut_the_eligible_set_and_hide_the_rest() -> None:
    objective = masked_objective(VOCABULARY, random_length_fraction=0.25)
    samples = given(4000, length=16, eligible=16)
    seen = objective.seen(samples, KEY)
    lengths = seen.is_eligible.sum(dim=1)
    cut = lengths[lengths < 16]
    assert 800 < len(cut) < 1100  # 15/16 of a quarter, 938, five deviations either way
    assert set(cut.tolist()) == set(range(1, 16))
    rows = objective.rows(seen, 1, KEY)
    assert int(rows.is_scored.sum()) == int(lengths.sum())
    assert rows.context.documents is not None
    is_kept = seen.is_eligible.repeat_interleave(2, dim=0)
    assert (rows.context.documents[is_kept] == 0).all() and (rows.context.documents[~is_kept] != 0).all()
    whole = masked_objective(VOCABULARY)
    assert whole.seen(samples, KEY) is samples and whole.rows(samples, 1, KEY).context.is_dense
