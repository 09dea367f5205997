"""The likelihood bound: how many nats a model needs for held-out rows, at most.

What one draw scores is the objective's (`Objective.bound`): exact-count masks for masked diffusion, the tokens
themselves for an autoregressive model, whose one draw is exact. The draws of a replicate depend on one another, so the
standard error comes from independent replicates of the set of draws.

Shapes: b rows, s tokens of a row. All randomness is the noise law (docs/architecture.md, "Likelihood"): the same bits
on every device, layout and batch size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megamask.errors import UsageError
from megamask.objectives.base import Bound, Rows

LIKELIHOOD_LAW_VERSION = 1
_MAX_DRAWS = 1 << 24  # the draw shares a 32-bit word with the purpose

Score = Callable[[Rows], Tensor]
"""Rows -> float64 [r]: sum of weight * cross entropy over each row's scored positions, in nats; forward only."""


@dataclass(frozen=True, kw_only=True)
class LikelihoodReport:
    """The bound on a set of rows.

    Args:
        nelbo_nats_per_token: sum of the rows' bounds over the number of scored tokens; a perplexity from it is an
            upper bound.
        standard_error: of nelbo_nats_per_token, from the spread of the replicates: the error of the estimate for this
            very text, not the text's own sampling error. 0 for one replicate of an exact bound.
        num_tokens: scored tokens, each counted once; end-of-document tokens are scored.
        num_bytes: UTF-8 bytes of those tokens; end-of-document adds none. None where they were not counted.
        num_samples: rows.
        num_draws, num_replicates: masks per row in a replicate, and replicates.
    """

    nelbo_nats_per_token: float
    standard_error: float
    num_tokens: int
    num_bytes: int | None
    num_samples: int
    num_draws: int
    num_replicates: int

    @property
    def bits_per_byte(self) -> float | None:
        """The bound in bits per UTF-8 byte; None where no bytes are known."""
        if not self.num_bytes:
            return None
        return bits_per_byte(self.nelbo_nats_per_token, num_tokens=self.num_tokens, num_bytes=self.num_bytes)


def bits_per_byte(nats_per_token: float, *, num_tokens: int, num_bytes: int) -> float:
    """Nats per token as bits per byte of the same text."""
    return nats_per_token * num_tokens / (math.log(2) * num_bytes)


def row_estimates(
    score: Score,
    bound: Bound,
    tokens: Tensor,
    is_eligible: Tensor,
    row_index: Tensor,
    *,
    draws: int,
    replicates: int,
    key: tuple[int, int],
    batch_rows: int,
) -> Tensor:
    """Each replicate's estimate of each row's bound, in nats.

    Args:
        tokens: [n, s] int64. is_eligible: [n, s] bool. row_index: [n] int64.
        draws, replicates: 1 and 1 for an exact bound.
        batch_rows: rows per call of `score`; the last batch is filled up with unscored rows, so that every call has the
            same shape.

    Returns: [replicates, n] float64 on the host; the mean of `draws` unbiased estimates each.
    Raises: UsageError: draws, replicates or batch_rows out of range, or no token to score.
    """
    is_scored = bound.scored(tokens, is_eligible)
    _check(is_scored, draws=draws, replicates=replicates, batch_rows=batch_rows, is_exact=bound.is_exact)
    num_rows, batch = len(tokens), min(batch_rows, max(1, len(tokens)))
    estimates = torch.zeros(replicates, num_rows, dtype=torch.float64)
    for start in range(0, num_rows, batch):
        places = torch.arange(start, start + batch, device=tokens.device)
        is_real = (places < num_rows)[:, None]
        places = places.clamp(max=num_rows - 1)
        for replicate in range(replicates):
            total = torch.zeros(batch, dtype=torch.float64)
            for member in range(draws):
                drawn = bound.draw(
                    tokens[places],
                    is_scored[places],
                    row_index[places],
                    replicate=replicate,
                    member=member,
                    draws=draws,
                    key=key,
                )
                sums = score(replace(drawn.rows, is_scored=drawn.rows.is_scored & is_real)).to("cpu", torch.float64)
                total += sums if drawn.scale is None else sums * drawn.scale.cpu()
            stop = min(start + batch, num_rows)
            estimates[replicate, start:stop] = total[: stop - start] / draws
    return estimates


def _check(is_scored: Tensor, *, draws: int, replicates: int, batch_rows: int, is_exact: bool) -> None:
    least_replicates = 1 if is_exact else 2
    for name, value, least in (
        ("draws", draws, 1),
        ("replicates", replicates, least_replicates),
        ("batch_rows", batch_rows, 1),
    ):
        if value < least:
            raise UsageError(f"{name} is {value}; allowed: >= {least}. Nothing was scored.")
    if draws * replicates > _MAX_DRAWS:
        raise UsageError(f"draws * replicates is {draws * replicates}; allowed: <= {_MAX_DRAWS}. Nothing was scored.")
    if len(is_scored) and not bool(is_scored.any()):
        raise UsageError("no row has a token to score, so there is no bound. Nothing was scored.")


def summarize(estimates: Tensor, num_scored: Tensor, *, draws: int, num_bytes: int | None) -> LikelihoodReport:
    """The report of all rows, the same number for every order and number of ranks.

    Args:
        estimates: [replicates, n] float64, as `row_estimates` gives them. num_scored: [n] int64.
    """
    replicates, num_rows = estimates.shape
    if num_rows == 0:
        raise UsageError("there is no row to score. Nothing was done.")
    num_tokens = int(num_scored.sum())
    means = [math.fsum(row) / num_tokens for row in estimates.tolist()]  # fsum: exact, so no order can show
    mean = math.fsum(means) / replicates
    variance = math.fsum((value - mean) ** 2 for value in means) / max(1, replicates - 1)
    return LikelihoodReport(
        nelbo_nats_per_token=mean,
        standard_error=math.sqrt(variance / replicates),
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        num_samples=num_rows,
        num_draws=draws,
        num_replicates=replicates,
    )


def evaluate_rows(
    score: Score,
    bound: Bound,
    tokens: Tensor,
    is_eligible: Tensor,
    row_index: Tensor,
    *,
    draws: int,
    replicates: int,
    key: tuple[int, int],
    batch_rows: int,
    num_bytes: int | None = None,
) -> LikelihoodReport:
    """The likelihood bound on rows, on one process. Arguments and errors as `row_estimates` and `summarize`."""
    if bound.is_exact:
        draws = replicates = 1
    estimates = row_estimates(
        score,
        bound,
        tokens,
        is_eligible,
        row_index,
        draws=draws,
        replicates=replicates,
        key=key,
        batch_rows=batch_rows,
    )
    return summarize(estimates, bound.scored(tokens, is_eligible).sum(dim=1), draws=draws, num_bytes=num_bytes)
