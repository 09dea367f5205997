"""Distance that a sum of independent draws may stray before the code that drew them must be wrong."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

ONCE_IN_A_BILLION = 1e-9


def largest_deviation(
    values: Floats, probabilities: Floats, *, repeats: int, failure: float = ONCE_IN_A_BILLION
) -> float:
    """A bound that |sum - its expectation| exceeds with less than the probability `failure`.

    The sum has `repeats` independent terms of each row q of the tables; a term of row q is values[q, o] with
    probability probabilities[q, o]. Chernoff: P(sum - E >= x) <= exp(log E exp(s (sum - E)) - s x) for every s > 0,
    with the exact moment generating function of the table. No normal approximation: it holds for heavy tails too.
    """
    centred = values - (values * probabilities).sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        log_probabilities = np.log(probabilities)  # what cannot happen has -inf
    typical = math.sqrt(float((probabilities * centred**2).sum(axis=1).max())) or 1.0
    bounds = []
    for side in (centred, -centred):
        best = math.inf
        for s in np.geomspace(1e-3, 3, 40) / typical:
            exponents = s * side + log_probabilities
            largest = exponents.max(axis=1, keepdims=True)
            log_moments = largest[:, 0] + np.log(np.exp(exponents - largest).sum(axis=1))
            best = min(best, (repeats * float(log_moments.sum()) + math.log(2 / failure)) / s)
        bounds.append(best)
    return max(bounds)


def binomial(n: int, p: Floats) -> Floats:
    """[len(p), n + 1] probabilities of k = 0..n successes."""
    k = np.arange(n + 1)
    log_choose = np.array([math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in k])
    return np.exp(log_choose + np.outer(np.log(p), k) + np.outer(np.log1p(-p), n - k))
