from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megamask.diffusion import exact_counts as exact_counts_module
from megamask.diffusion.exact_counts import exact_count_masks, exact_counts
from megamask.diffusion.philox import run_key
from megamask.errors import UsageError
from megamask.evaluation import likelihood
from megamask.evaluation.likelihood import (
    bits_per_byte,
    evaluate_rows,
    row_estimates,
    summarize,
)
from megamask.objectives.masked import MaskedBound
from support.likelihood_oracle import counts as oracle_counts
from support.likelihood_oracle import golden_cases
from support.likelihood_oracle import masked_positions as oracle_masked
from support.objectives import on_rows

GOLDEN = Path(__file__).parents[1] / "golden" / "likelihood_v1.json"
MASK = 9
BOUND = MaskedBound(mask_token_id=MASK)


def _counts(row: int, n: int, *, draws: int, replicate: int, seed: int) -> list[int]:
    found = exact_counts(torch.tensor([row]), torch.tensor([n]), draws=draws, replicate=replicate, key=run_key(seed))
    return [int(count) for count in found[:, 0]]


def _masked(row: int, is_eligible: list[bool], count: int, *, draw: int, seed: int) -> list[int]:
    mask = exact_count_masks(
        torch.tensor([row]), torch.tensor([is_eligible]), torch.tensor([count]), draw=draw, key=run_key(seed)
    )
    return mask[0].nonzero()[:, 0].tolist()


def test_golden_file_is_what_the_law_says() -> None:
    assert json.loads(GOLDEN.read_text())["cases"] == golden_cases()


@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text())["cases"], ids=lambda case: f"row{case['row']}")
def test_counts_and_masks_equal_the_golden_vectors(case: dict[str, object]) -> None:
    seed, row, n, draws, replicate = (
        int(str(case[name])) for name in ("seed", "row", "num_eligible", "draws", "replicate")
    )
    assert _counts(row, n, draws=draws, replicate=replicate, seed=seed) == case["counts"]
    is_eligible = [position < n for position in range(int(str(case["length"])))]
    masks = [
        _masked(row, is_eligible, count, draw=replicate * draws + member, seed=seed)
        for member, count in enumerate(_counts(row, n, draws=draws, replicate=replicate, seed=seed))
    ]
    assert masks == case["masked"]


@given(
    row=st.integers(0, 2**40),
    is_eligible=st.lists(st.booleans(), min_size=1, max_size=24).filter(any),
    draws=st.integers(1, 9),
    replicate=st.integers(0, 300),
    seed=st.integers(0, 2**64 - 1),
)
def test_counts_and_masks_equal_the_slow_law(
    row: int, is_eligible: list[bool], draws: int, replicate: int, seed: int
) -> None:
    n = sum(is_eligible)
    counts = _counts(row, n, draws=draws, replicate=replicate, seed=seed)
    assert counts == oracle_counts(row, n, draws=draws, replicate=replicate, seed=seed)
    eligible = [position for position, flag in enumerate(is_eligible) if flag]
    draw = replicate * draws + draws - 1
    found = _masked(row, is_eligible, counts[-1], draw=draw, seed=seed)
    assert found == oracle_masked(row, eligible, counts[-1], draw=draw, seed=seed)
    assert len(found) == counts[-1]


@pytest.mark.parametrize(("n", "draws"), [(3, 2), (64, 128), (7, 7), (1, 4), (10, 4), (256, 3)])
def test_every_member_is_exactly_uniform_over_the_words(n: int, draws: int, monkeypatch: pytest.MonkeyPatch) -> None:
    words = torch.tensor([-(-first * 2**32 // n) for first in range(n)] + [0, 2**32 - 1])  # the least word of each k
    monkeypatch.setattr(exact_counts_module, "philox4x32", lambda counter, key: (words,))
    rows = torch.zeros(n + 2, dtype=torch.int64)
    found = exact_counts(rows, torch.full_like(rows, n), draws=draws, replicate=0, key=(0, 0))
    for member in found:
        assert sorted(member[:n].tolist()) == list(range(1, n + 1))
    assert found.min() >= 1 and found.max() <= n
    widths = [*(words[1:n] - words[: n - 1]).tolist(), 2**32 - int(words[n - 1])]
    assert max(widths) - min(widths) <= 1


def test_members_of_one_set_are_spread_evenly() -> None:
    counts = sorted(_counts(3, 64, draws=8, replicate=0, seed=1))
    assert {later - earlier for earlier, later in itertools.pairwise(counts)} == {8}


def test_equal_words_mask_the_lower_position_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def same_word(index: Tensor, num_positions: int, **_: object) -> Tensor:
        return torch.full((len(index), num_positions), 2**32 - 1)

    monkeypatch.setattr(exact_counts_module, "uniform_words", same_word)
    assert _masked(0, [False, True, True, False, True], 2, draw=0, seed=1) == [1, 2]


class TinyJoint:
    """Three binary tokens with a known joint probability, and its exact conditionals as a network.

    With exact conditionals every order of decoding spends -log p(x), so the bound is the negative log-likelihood.
    """

    def __init__(self) -> None:
        weights = [5.0, 1.0, 2.0, 7.0, 1.0, 3.0, 11.0, 2.0]
        states = list(itertools.product((0, 1), repeat=3))
        self.probability = {state: weight / sum(weights) for state, weight in zip(states, weights, strict=True)}

    def sum_cross_entropy(self, x_t: Tensor, x_0: Tensor, is_masked: Tensor) -> Tensor:
        sums = []
        for noisy, clean, masked in zip(x_t.tolist(), x_0.tolist(), is_masked.tolist(), strict=True):
            sums.append(sum(self.cost(tuple(noisy), clean, at) for at in range(3) if masked[at]))
        return torch.tensor(sums, dtype=torch.float64)

    def cost(self, noisy: tuple[int, ...], clean: list[int], at: int) -> float:
        fits = [state for state in self.probability if all(n in (MASK, s) for n, s in zip(noisy, state, strict=True))]
        total = sum(self.probability[state] for state in fits)
        return -math.log(sum(self.probability[state] for state in fits if state[at] == clean[at]) / total)


@pytest.mark.promise("the bound is unbiased for the exact likelihood of a tiny model")
def test_bound_is_unbiased_for_the_exact_likelihood_of_a_tiny_model() -> None:
    joint, state = TinyJoint(), (1, 0, 1)
    truth = -math.log(joint.probability[state])
    num_rows, replicates, draws = 1500, 2, 2
    tokens = torch.tensor([state] * num_rows)
    estimates = row_estimates(
        on_rows(joint.sum_cross_entropy),
        BOUND,
        tokens,
        torch.ones_like(tokens, dtype=torch.bool),
        torch.arange(num_rows),
        draws=draws,
        replicates=replicates,
        key=run_key(11),
        batch_rows=500,
    )
    by_row = estimates.mean(dim=0)  # rows are independent
    error = float(by_row.std() / math.sqrt(num_rows))
    assert float(by_row.std()) > 0.1  # else the test would show nothing
    assert abs(float(by_row.mean()) - truth) < 6.2 * error  # two-sided normal tail below 1e-9


@pytest.mark.promise("its standard error is the spread of independent evaluations")
def test_standard_error_matches_the_spread_of_independent_evaluations() -> None:
    joint = TinyJoint()
    tokens = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 1, 1]])
    found = [_evaluate(joint, tokens, seed=seed, replicates=16, draws=1) for seed in range(40)]
    spread = torch.tensor([report.nelbo_nats_per_token for report in found]).std()
    mean_error = sum(report.standard_error for report in found) / len(found)
    assert 0.5 < mean_error / float(spread) < 2.0


def _evaluate(joint: TinyJoint, tokens: Tensor, **options: int) -> likelihood.LikelihoodReport:
    chosen = {"seed": 1, "draws": 3, "replicates": 4, "batch_rows": 2} | options
    return evaluate_rows(
        on_rows(joint.sum_cross_entropy),
        BOUND,
        tokens,
        torch.ones_like(tokens, dtype=torch.bool),
        torch.arange(len(tokens)),
        draws=chosen["draws"],
        replicates=chosen["replicates"],
        key=run_key(chosen["seed"]),
        batch_rows=chosen["batch_rows"],
        num_bytes=17,
    )


@pytest.mark.promise("it does not depend on the batch size or on the order of rows")
def test_report_is_the_same_whatever_the_batch_rows() -> None:
    tokens = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 1, 1]])
    reports = [_evaluate(TinyJoint(), tokens, batch_rows=batch_rows) for batch_rows in (1, 2, 3, 5, 64)]
    assert all(report == reports[0] for report in reports)


def test_report_changes_with_the_seed_and_counts_what_it_scored() -> None:
    tokens = torch.tensor([[1, 0, 1], [0, 0, 1]])
    first, second = (_evaluate(TinyJoint(), tokens, seed=seed) for seed in (1, 2))
    assert first.nelbo_nats_per_token != second.nelbo_nats_per_token
    assert (first.num_tokens, first.num_bytes, first.num_samples) == (6, 17, 2)
    assert first.bits_per_byte == pytest.approx(first.nelbo_nats_per_token * 6 / 17 / math.log(2))


def test_padding_is_neither_masked_nor_scored() -> None:
    seen: list[Tensor] = []

    def constant(x_t: Tensor, x_0: Tensor, is_masked: Tensor) -> Tensor:
        assert torch.equal(x_t, torch.where(is_masked, MASK, x_0))
        seen.append(is_masked)
        return 2.0 * is_masked.sum(dim=1).to(torch.float64)

    tokens = torch.arange(16).reshape(2, 8) % 5
    is_eligible = torch.ones(2, 8, dtype=torch.bool)
    is_eligible[1, 3:] = False
    report = evaluate_rows(
        on_rows(constant),
        BOUND,
        tokens,
        is_eligible,
        torch.arange(2),
        draws=4,
        replicates=3,
        key=run_key(1),
        batch_rows=2,
    )
    assert not (torch.cat(seen) & ~is_eligible.repeat(12, 1)).any()
    assert report.num_tokens == 11
    assert report.nelbo_nats_per_token == pytest.approx(2.0)  # n/k * k * 2 nats, for every mask
    assert report.standard_error == pytest.approx(0.0, abs=1e-12)
    assert report.bits_per_byte is None


def test_rows_weigh_by_their_tokens() -> None:
    estimates = torch.tensor([[10.0, 2.0], [10.0, 2.0]], dtype=torch.float64)
    report = summarize(estimates, torch.tensor([5, 1]), draws=1, num_bytes=None)
    assert report.nelbo_nats_per_token == 2.0


@pytest.mark.promise("it does not depend on the batch size or on the order of rows")
def test_summary_does_not_depend_on_the_order_of_rows() -> None:
    estimates = torch.rand(3, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    num_eligible = torch.arange(1, 201)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    assert summarize(estimates, num_eligible, draws=1, num_bytes=None) == summarize(
        estimates[:, order], num_eligible[order], draws=1, num_bytes=None
    )


def test_bits_per_byte_of_one_bit_tokens_of_one_byte_is_one() -> None:
    assert bits_per_byte(math.log(2), num_tokens=5, num_bytes=5) == pytest.approx(1.0)
    assert bits_per_byte(math.log(2), num_tokens=5, num_bytes=10) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"draws": 0}, "draws is 0"),
        ({"replicates": 1}, "replicates is 1"),
        ({"batch_rows": 0}, "batch_rows is 0"),
        ({"draws": 2**23, "replicates": 3}, "draws \\* replicates"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        _evaluate(TinyJoint(), torch.tensor([[1, 0, 1]]), **options)


def test_row_without_eligible_tokens_is_refused() -> None:
    with pytest.raises(UsageError, match="no row has a token to score"):
        row_estimates(
            on_rows(TinyJoint().sum_cross_entropy),
            BOUND,
            torch.zeros(1, 3, dtype=torch.int64),
            torch.zeros(1, 3, dtype=torch.bool),
            torch.arange(1),
            draws=1,
            replicates=2,
            key=(0, 0),
            batch_rows=1,
        )
