"""The objective estimates the NELBO: unbiased under every schedule and view, with the pair's promised variance.

A "model" of L positions here is a table CE[mask, i]: the cross entropy of token i under every mask of the row, 2^L of
them. Its NELBO, the integral over p in [eps, 1-eps] of (1/p) E[sum of masked CE], is enumerated, not sampled.

Legend: q quadrature nodes, o outcomes (2^L masks, as integers whose bit i means that position i is masked).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megamask.diffusion.corruption import CorruptedBatch, corrupt
from megamask.diffusion.philox import run_key
from megamask.diffusion.schedule import EPS, noise_schedule, stratified_times, threshold
from megamask.engine.selection import select_rows
from support.deviation import Floats, binomial, largest_deviation
from support.terms import normalizer, weighted_cross_entropy_sum

NAMES = ("linear", "cosine_md4", "cosine_bd3")
LENGTH = 4
MASKS = np.arange(2**LENGTH)
IS_MASKED = (MASKS[:, None] >> np.arange(LENGTH)) & 1  # [o, i]
# The more is masked the harder each token is, unevenly: a table with no symmetry that could hide a wrong view.
CE = 0.3 + 0.5 * IS_MASKED.sum(axis=1, keepdims=True) + np.sin(1.0 + 7 * MASKS[:, None] + 3 * np.arange(LENGTH)) * 0.25
SCORE = (CE * IS_MASKED).sum(axis=1)  # [o] sum of masked cross entropy


def mask_probabilities(p: Floats) -> Floats:
    """[q, o]: the chance of each mask when every position is masked with probability p."""
    sizes = IS_MASKED.sum(axis=1)
    return p[:, None] ** sizes * (1 - p[:, None]) ** (LENGTH - sizes)


def gauss(num_nodes: int, low: float, high: float) -> tuple[Floats, Floats]:
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    return low + (nodes + 1) * (high - low) / 2, weights * (high - low) / 2


def enumerated_nelbo() -> float:
    """Exact: (1/p) P(mask) is a polynomial in p for every mask that scores anything."""
    p, weights = gauss(LENGTH, EPS, 1 - EPS)
    return float((weights / p) @ (mask_probabilities(p) @ SCORE))


def noised(
    times: list[float], name: str, *, complementary: bool, length: int = LENGTH, draw: int = 0, first: int = 0
) -> CorruptedBatch:
    x_0 = torch.zeros(len(times), length, dtype=torch.int64)
    return corrupt(
        x_0,
        x_0 == 0,
        torch.arange(first, first + len(times)),
        times,
        schedule=noise_schedule(name),
        complementary=complementary,
        mask_token_id=1,
        key=run_key(11),
        draw=draw,
    )


def cross_entropy(is_masked: torch.Tensor) -> torch.Tensor:
    """[r, L] float32 cross entropy of the table model at every position."""
    mask = (is_masked.long() << torch.arange(LENGTH)).sum(dim=1)
    return torch.from_numpy(CE).float()[mask]


@pytest.mark.promise("the expected loss equals the enumerated bound of a tiny model")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("view", ["single", "A", "B"])
def test_expected_loss_is_the_enumerated_nelbo(name: str, view: str) -> None:
    # Expectation over masks by enumeration, over t by quadrature: nothing is sampled. The weights are corrupt's.
    t, quadrature = gauss(200, 0.0, 1.0)
    complementary, views, row = {"single": (False, 1, 0), "A": (True, 2, 0), "B": (True, 2, 1)}[view]
    weight = noised(t.tolist(), name, complementary=complementary).weight[row::views].double().numpy()
    realised = np.array([threshold(noise_schedule(name).mask_probability(x)) for x in t]) / 2**32
    p = 1 - realised if view == "B" else realised
    expected = float((quadrature * weight) @ (mask_probabilities(p) @ SCORE))
    assert expected == pytest.approx(enumerated_nelbo(), rel=1e-6)


@pytest.mark.parametrize("wrong", ["unweighted", "p of 1 - t"])
def test_enumeration_tells_wrong_weights_of_view_b(wrong: str) -> None:
    t, quadrature = gauss(200, 0.0, 1.0)
    schedule = noise_schedule("cosine_md4")
    p = np.array([schedule.mask_probability(x) for x in t])
    weight = np.ones_like(t) if wrong == "unweighted" else 1 / np.array([schedule.mask_probability(1 - x) for x in t])
    biased = float((quadrature * weight) @ (mask_probabilities(1 - p) @ SCORE))
    assert abs(biased / enumerated_nelbo() - 1) > 0.1


@pytest.mark.promise("the expected loss equals the enumerated bound of a tiny model")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("complementary", [False, True])
def test_sampled_loss_is_the_enumerated_nelbo_within_one_in_a_billion(name: str, complementary: bool) -> None:
    # Masks are sampled as in training, through the head's row selection and the sum; t takes quadrature nodes, so
    # that the heavy tail of 1/p is integrated and not sampled. Chernoff's bound with the exact distribution of each
    # node's term holds for correct code except once in 10^9 (for the six cases together), for any seed.
    repeats = 2048
    t, quadrature = gauss(64, 0.0, 1.0)
    views = 2 if complementary else 1
    made = noised(np.repeat(t, repeats).tolist(), name, complementary=complementary)
    factor = np.repeat(quadrature / repeats, repeats * views)
    indices, is_used = select_rows(made.is_masked, capacity=len(t) * repeats * LENGTH)
    weight = made.weight * torch.from_numpy(factor).float()
    losses = cross_entropy(made.is_masked).flatten()[indices]
    sampled = float(weighted_cross_entropy_sum(losses, weight[indices // LENGTH], is_used)) / normalizer(LENGTH, views)

    realised = np.array([threshold(noise_schedule(name).mask_probability(x)) for x in t]) / 2**32
    weights = made.weight.double().numpy().reshape(len(t), repeats, views)[:, 0]
    terms = weights[:, :1] * SCORE
    if complementary:
        terms = terms + weights[:, 1:] * SCORE[::-1]  # the complement of mask o is mask 2^L - 1 - o
    terms = terms * quadrature[:, None] / repeats / normalizer(LENGTH, views)
    bound = largest_deviation(terms, mask_probabilities(realised), repeats=repeats, failure=1e-9 / 6)
    truth = enumerated_nelbo() / LENGTH
    assert abs(sampled - truth) <= bound + 1e-5 * truth  # float32 sums
    assert bound < 0.05 * truth


def test_loss_over_training_steps_approaches_the_enumerated_nelbo() -> None:
    # The complete path of training: stratified times, pair, sum, count. The expectation over masks given the times is
    # enumerated, so that the only sampling left is u, one a step; strata make its error tiny.
    size, schedule = 64, noise_schedule("linear")
    total = 0.0
    for step in range(1, 201):
        times = stratified_times(step, size, run_key(3))
        weight = noised(times, "linear", complementary=True).weight.double().numpy().reshape(size, 2)
        p = np.array([threshold(schedule.mask_probability(t)) for t in times]) / 2**32
        sums = weight[:, 0] * (mask_probabilities(p) @ SCORE) + weight[:, 1] * (mask_probabilities(1 - p) @ SCORE)
        total += sums.sum() / normalizer(size * LENGTH, 2)
    # A stratum of width 1/64 leaves at most (range of the integrand) / 64 of error in any one step.
    assert total / 200 == pytest.approx(enumerated_nelbo() / LENGTH, rel=0.005)


def variance_constant() -> float:
    """K, the mean of 1/p for p uniform on [eps, 1-eps]."""
    return math.log((1 - EPS) / EPS) / (1 - 2 * EPS)


def variance_nodes(num_nodes: int) -> tuple[Floats, Floats]:
    """Times of the linear schedule and weights for the integral over t, dense where 1/p is large.

    Nodes are evenly dense in the log odds of p: variances go like 1/p and 1/(1-p), and dp = p(1-p) d(log odds) makes
    the integrand bounded. Sampling t instead needs millions of draws before the rare small p show up in proportion.
    """
    edge = math.log((1 - EPS) / EPS)
    log_odds, weights = gauss(num_nodes, -edge, edge)
    p = 1 / (1 + np.exp(-log_odds))
    return (p - EPS) / (1 - 2 * EPS), weights * p * (1 - p) / (1 - 2 * EPS)


def row_losses(made: CorruptedBatch) -> Floats:
    """[r] weighted loss of each row when every masked token costs 1 nat."""
    return (made.weight.double() * made.is_masked.sum(dim=1)).numpy()


def test_ratio_of_pair_to_independent_variance_is_0831_at_eps_1e_3() -> None:
    constant = variance_constant()
    assert (constant - 2) / (constant - 1) == pytest.approx(0.831, abs=5e-4)


@pytest.mark.promise("the variance of the pair is (K-2)/(K-1) times that of two independent views")
def test_expected_variance_of_the_pair_is_k_minus_2_over_k_minus_1() -> None:
    # With constant cross entropy (1 nat) each view's mean over masks is p'(t) * n = the same at every t, so a variance
    # is the integral over t of the variance given t: binomial, n p (1-p) times the squared slope of the loss in k.
    t, quadrature = variance_nodes(100)
    weight = noised(t.tolist(), "linear", complementary=True).weight.double().numpy().reshape(-1, 2)
    p = np.array([threshold(noise_schedule("linear").mask_probability(x)) for x in t]) / 2**32
    pair = quadrature @ (p * (1 - p) * ((weight[:, 0] - weight[:, 1]) / 2) ** 2)
    independent = quadrature @ (p * (1 - p) * weight[:, 0] ** 2) / 2
    constant = variance_constant()
    assert pair / independent == pytest.approx((constant - 2) / (constant - 1), rel=1e-5)


@pytest.mark.promise("the variance of the pair is (K-2)/(K-1) times that of two independent views")
def test_sampled_variance_of_the_pair_is_as_promised_within_one_in_a_billion() -> None:
    # Real masks, many at each node of t. Both estimates of a row's loss use two forward passes: the pair, and two
    # independent views (draws 1 and 2). Their means over masks do not depend on t (see above), so neither the joint law
    # of the two times nor sampling t matters: the squared deviation from the known mean, integrated over t by
    # quadrature, has the variance as its expectation. The promise "ratio = rho" means that the integral of
    # deviation(pair)^2 - rho * deviation(independent)^2 has expectation 0. Chernoff's bound with the exact joint
    # binomial distribution gives how far it may be from 0, with no normal approximation for its heavy tails.
    n, repeats = 64, 8192
    t, quadrature = variance_nodes(40)
    rho = (variance_constant() - 2) / (variance_constant() - 1)
    mean = (1 - 2 * EPS) * n
    variance_pair = variance_independent = 0.0
    weights = []
    for node, factor in enumerate(quadrature):
        place = {"times": [float(t[node])] * repeats, "name": "linear", "length": n, "first": node * repeats}
        pair = noised(**place, complementary=True)  # type: ignore[arg-type]
        views = [noised(**place, complementary=False, draw=draw) for draw in (1, 2)]  # type: ignore[arg-type]
        loss_pair = row_losses(pair).reshape(-1, 2).mean(axis=1)
        loss_independent = (row_losses(views[0]) + row_losses(views[1])) / 2
        variance_pair += float(factor * ((loss_pair - mean) ** 2).mean())
        variance_independent += float(factor * ((loss_independent - mean) ** 2).mean())
        weights.append(pair.weight[:2].double().numpy())

    p = np.array([threshold(noise_schedule("linear").mask_probability(x)) for x in t]) / 2**32
    weight = np.array(weights)
    k, counts = np.arange(n + 1), binomial(n, p)
    of_pair = ((weight[:, :1] * k + weight[:, 1:] * (n - k)) / 2 - mean) ** 2
    of_two = (weight[:, 0, None, None] * (k[:, None] + k) / 2 - mean) ** 2
    scale = quadrature[:, None] / repeats
    bound = largest_deviation(of_pair * scale, counts, repeats=repeats, failure=5e-10)
    bound += largest_deviation(
        rho * of_two.reshape(len(t), -1) * scale,
        (counts[:, :, None] * counts[:, None, :]).reshape(len(t), -1),
        repeats=repeats,
        failure=5e-10,
    )
    assert abs(variance_pair - rho * variance_independent) <= bound
    # The bound is narrow enough to tell the promise from "no gain" (ratio 1) with certainty.
    assert bound < 0.5 * (1 - rho) * variance_independent
    assert variance_pair / variance_independent == pytest.approx(rho, abs=bound / variance_independent)
