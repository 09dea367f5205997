"""The exact-count likelihood bound: how many nats a masked-diffusion model needs for held-out rows, at most.

-log p(x) <= E_k [ n/k * E_mask [ sum over masked of CE ] ], k uniform on 1..n, the mask uniform among those of size k:
the any-order form of the bound, over the full range of noise (no eps). LLaDA (arXiv:2502.09992, appendix) spreads the
k of one set of draws evenly; its rounding is not uniform, ours is integer arithmetic and is. The draws of a set depend
on one another, so the standard error comes from independent replicates of the whole set.

Shapes: b rows, s tokens of a row. All randomness is the noise law (docs/architecture.md, "Likelihood"): the same bits
on every device, layout and batch size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megamask.diffusion.philox import Purpose, philox4x32, uniform_words
from megamask.errors import UsageError

LIKELIHOOD_LAW_VERSION = 1
_MAXIMUM_DRAWS = 1 << 24  # the draw shares a 32-bit word with the purpose

SumCrossEntropy = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t [b, s], x_0 [b, s], is_masked [b, s]) -> float64 [b]: sum of cross entropy over masked positions, in nats."""


@dataclass(frozen=True, kw_only=True)
class LikelihoodReport:
    """The bound on a set of rows.

    Args:
        nelbo_nats_per_token: sum of the rows' bounds over the number of scored tokens; a perplexity from it is an
            upper bound.
        standard_error: of nelbo_nats_per_token, from the spread of the replicates: the error of the estimate for this
            very text, not the text's own sampling error.
        num_tokens: eligible tokens, each counted once; end-of-document tokens are scored.
        num_bytes: UTF-8 bytes of those tokens; end-of-document adds none. None where nobody counted.
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


def exact_counts(
    row_index: Tensor, num_eligible: Tensor, *, draws: int, replicate: int, key: tuple[int, int]
) -> Tensor:
    """How many tokens each draw of a replicate masks.

    Args:
        row_index: [b] int64, 0-based row of the split or text.
        num_eligible: [b] int64, n of each row, >= 1.

    Returns: [draws, b] int64 in 1..n; over a uniform random word each draw's count is uniform.
    """
    counter = (row_index & 0xFFFFFFFF, row_index >> 32, 0, int(Purpose.VALIDATION_TIME) + 256 * replicate)
    word = philox4x32(counter, key)[0]
    first = (word * num_eligible) >> 32  # k - 1
    offsets = [torch.div(member * num_eligible, draws, rounding_mode="floor") for member in range(draws)]
    return torch.stack([(first + offset) % num_eligible + 1 for offset in offsets])


def exact_count_masks(
    row_index: Tensor, is_eligible: Tensor, counts: Tensor, *, draw: int, key: tuple[int, int]
) -> Tensor:
    """Masks the `counts` eligible positions of each row that have the smallest (word, position).

    Args:
        row_index: [b] int64. is_eligible: [b, s] bool. counts: [b] int64, at most the row's eligible positions.
        draw: replicate * draws + member.

    Returns: [b, s] bool.
    """
    words = uniform_words(row_index, is_eligible.shape[1], purpose=Purpose.VALIDATION_MASK, key=key, draw=draw)
    last = torch.full_like(words, 1 << 32)
    order = torch.where(is_eligible, words, last).argsort(dim=1, stable=True)  # equal words: the lower position first
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    return is_eligible & (rank < counts[:, None])


def row_estimates(
    sum_cross_entropy: SumCrossEntropy,
    tokens: Tensor,
    is_eligible: Tensor,
    row_index: Tensor,
    *,
    draws: int,
    replicates: int,
    key: tuple[int, int],
    mask_token_id: int,
    batch_rows: int,
) -> Tensor:
    """Each replicate's estimate of each row's bound, in nats.

    Args:
        tokens: [n, s] int64. is_eligible: [n, s] bool, at least one a row. row_index: [n] int64.
        batch_rows: rows per call of `sum_cross_entropy`; the last batch is filled up with unmasked rows, so that every
            call has the same shape.

    Returns: [replicates, n] float64 on the host; the mean of `draws` unbiased estimates each.
    Raises: UsageError: draws, replicates or batch_rows out of range, or a row without eligible tokens.
    """
    _check(is_eligible, draws=draws, replicates=replicates, batch_rows=batch_rows)
    num_rows, batch = len(tokens), min(batch_rows, max(1, len(tokens)))
    estimates = torch.zeros(replicates, num_rows, dtype=torch.float64)
    for start in range(0, num_rows, batch):
        places = torch.arange(start, start + batch, device=tokens.device)
        is_real = places < num_rows
        places = places.clamp(max=num_rows - 1)
        x_0, eligible, index = tokens[places], is_eligible[places], row_index[places]
        num_eligible = eligible.sum(dim=1)
        for replicate in range(replicates):
            counts = exact_counts(index, num_eligible, draws=draws, replicate=replicate, key=key)
            total = torch.zeros(batch, dtype=torch.float64)
            for member in range(draws):
                draw = replicate * draws + member
                is_masked = exact_count_masks(index, eligible, counts[member], draw=draw, key=key) & is_real[:, None]
                x_t = torch.where(is_masked, mask_token_id, x_0)
                sums = sum_cross_entropy(x_t, x_0, is_masked).to("cpu", torch.float64)
                total += sums * (num_eligible.to(torch.float64) / counts[member]).cpu()
            stop = min(start + batch, num_rows)
            estimates[replicate, start:stop] = total[: stop - start] / draws
    return estimates


def _check(is_eligible: Tensor, *, draws: int, replicates: int, batch_rows: int) -> None:
    for name, value, least in (("draws", draws, 1), ("replicates", replicates, 2), ("batch_rows", batch_rows, 1)):
        if value < least:
            raise UsageError(f"{name} is {value}; allowed: >= {least}. Nothing was scored.")
    if draws * replicates > _MAXIMUM_DRAWS:
        raise UsageError(
            f"draws * replicates is {draws * replicates}; allowed: <= {_MAXIMUM_DRAWS}. Nothing was scored."
        )
    if not bool(is_eligible.any(dim=1).all()):
        raise UsageError("a row has no eligible token, so it has no bound. Nothing was scored.")


def summarize(estimates: Tensor, num_eligible: Tensor, *, draws: int, num_bytes: int | None) -> LikelihoodReport:
    """The report of all rows, the same number in whatever order and on however many ranks they were computed.

    Args:
        estimates: [replicates, n] float64, as `row_estimates` gives them. num_eligible: [n] int64.
    """
    replicates, num_rows = estimates.shape
    if num_rows == 0:
        raise UsageError("there is no row to score. Nothing was done.")
    num_tokens = int(num_eligible.sum())
    means = [math.fsum(row) / num_tokens for row in estimates.tolist()]  # fsum: exact, so no order can show
    mean = math.fsum(means) / replicates
    variance = math.fsum((value - mean) ** 2 for value in means) / (replicates - 1)
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
    sum_cross_entropy: SumCrossEntropy,
    tokens: Tensor,
    is_eligible: Tensor,
    row_index: Tensor,
    *,
    draws: int,
    replicates: int,
    key: tuple[int, int],
    mask_token_id: int,
    batch_rows: int,
    num_bytes: int | None = None,
) -> LikelihoodReport:
    """The likelihood bound on rows, on one process. Arguments and errors as `row_estimates` and `summarize`."""
    estimates = row_estimates(
        sum_cross_entropy,
        tokens,
        is_eligible,
        row_index,
        draws=draws,
        replicates=replicates,
        key=key,
        mask_token_id=mask_token_id,
        batch_rows=batch_rows,
    )
    return summarize(estimates, is_eligible.sum(dim=1), draws=draws, num_bytes=num_bytes)
