from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megamask.diffusion.sampling import Draw, choose, gumbel_noise, score_slice
from megamask.errors import UsageError
from support.order_oracle import philox4x32_10


def answers(logits: torch.Tensor, cuts: list[int], excluded: set[int], draw: Draw) -> tuple[list[int], list[float]]:
    """The choice at every position when the vocabulary is cut at these ids."""
    num_positions, vocab_size = logits.shape
    parts = [
        score_slice(
            logits[:, first:stop],
            torch.arange(num_positions),
            torch.zeros(num_positions, dtype=torch.int64),
            num_positions=num_positions,
            vocab_size=vocab_size,
            first_token=first,
            is_excluded=torch.tensor([token in excluded for token in range(first, stop)]),
            draw=draw,
        )
        for first, stop in zip([0, *cuts], [*cuts, vocab_size], strict=True)
    ]
    found = choose(torch.stack(parts))
    return found.tokens.tolist(), found.confidence.tolist()


@pytest.mark.promise("a choice over vocabulary slices equals the argmax and softmax over the full vocabulary")
@given(
    seed=st.integers(0, 2**32),
    cuts=st.lists(st.integers(1, 12), max_size=3, unique=True).map(sorted),
    temperature=st.sampled_from([0.0, 0.5, 3.0]),
)
def test_choice_over_slices_is_the_argmax_and_softmax_over_all(seed: int, cuts: list[int], temperature: float) -> None:
    """The last slice may hold excluded ids alone, as the padding of a vocabulary does."""
    logits = torch.randn(5, 13, generator=torch.Generator().manual_seed(seed)) * 3
    excluded = {2, 11, 12}
    draw = Draw(step=2, sequences=(9,), seed=seed, temperature=temperature)
    tokens, confidence = answers(logits, cuts, excluded, draw)
    allowed = logits.double()
    allowed[:, sorted(excluded)] = -math.inf
    sequences = torch.full((5,), 9)
    noise = gumbel_noise(torch.arange(5), 5, 13, step=2, seed=seed, sequences=sequences)
    expected = (allowed + temperature * noise).argmax(dim=1)
    assert tokens == expected.tolist()
    probabilities = torch.softmax(allowed, dim=1).gather(1, expected[:, None])[:, 0]
    assert confidence == pytest.approx(probabilities.tolist(), rel=1e-12)


@pytest.mark.promise("a choice over vocabulary slices equals the argmax and softmax over the full vocabulary")
@pytest.mark.parametrize("cuts", [[], [2], [3, 5]])
def test_of_equal_logits_the_lowest_allowed_id_is_chosen(cuts: list[int]) -> None:
    tokens, confidence = answers(torch.zeros(2, 7), cuts, {0, 1}, Draw(step=1, sequences=(0,)))
    assert tokens == [2, 2]
    assert confidence == pytest.approx([0.2, 0.2], rel=1e-12)


def test_temperature_samples_from_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    count, temperature = 6000, 2.0
    sequences = torch.zeros(count, dtype=torch.int64)
    noise = gumbel_noise(torch.arange(count), count, 3, step=1, seed=5, sequences=sequences)
    chosen = (logits + temperature * noise).argmax(dim=1)
    for token, probability in enumerate(torch.softmax(logits / temperature, dim=0).tolist()):
        share = float((chosen == token).double().mean())
        assert abs(share - probability) < 6.2 * math.sqrt(probability * (1 - probability) / count)


@pytest.mark.promise("decoding noise follows the law, and a slice equals the same slice of the full tensor")
@given(
    positions=st.lists(st.integers(0, 63), min_size=1, max_size=4, unique=True),
    vocab_size=st.integers(1, 13),
    step=st.integers(1, 1000),
    seed=st.integers(0, 2**64 - 1),
    sequence=st.integers(0, 2**40),
    data=st.data(),
)
def test_noise_of_a_position_follows_the_law_whoever_else_is_asked_for(
    positions: list[int], vocab_size: int, step: int, seed: int, sequence: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, vocab_size - 1))
    count = data.draw(st.integers(1, vocab_size - first))
    sequences = torch.arange(len(positions)) + sequence
    noise = gumbel_noise(
        torch.tensor(positions),
        64,
        vocab_size,
        step=step,
        seed=seed,
        sequences=sequences,
        first_token=first,
        num_tokens=count,
    )
    assert noise.shape == (len(positions), count)
    key = (seed % 2**32, seed // 2**32)
    for row, position in enumerate(positions):
        low, high = (sequence + row) % 2**32, (sequence + row) // 2**32
        for token in range(first, first + count):
            word, lane = divmod(position * vocab_size + token, 4)
            bits = philox4x32_10((low, high, word, 6 + 256 * step), key)[lane]
            expected = -math.log(-math.log((bits + 0.5) / 2**32))
            assert float(noise[row, token - first]) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_noise_beyond_the_counter_is_refused() -> None:
    with pytest.raises(UsageError, match="counter"):
        gumbel_noise(torch.tensor([0]), 1 << 20, 1 << 14, step=1, seed=0, sequences=torch.tensor([0]))
