"""Random bits: the published vectors, independence of slicing, and refusal of what is not a counter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import megamask.diffusion.philox as philox_module
from megamask.diffusion.philox import Purpose, philox4x32, run_key, uniform_words
from support.order_oracle import philox4x32_10

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "noise_v1.json").read_text())
WORD = st.integers(0, 2**32 - 1)
INDEX = st.integers(0, 2**63 - 1)


@pytest.mark.promise("Philox gives the published words")
@pytest.mark.parametrize("case", GOLDEN["philox"], ids=lambda case: case["name"])
def test_philox_equals_the_published_vectors(case: dict[str, list[int]]) -> None:
    assert [int(word) for word in philox4x32(case["counter"], case["key"])] == case["words"]


@given(counter=st.tuples(WORD, WORD, WORD, WORD), key=st.tuples(WORD, WORD))
def test_philox_equals_plain_integers(counter: tuple[int, int, int, int], key: tuple[int, int]) -> None:
    assert tuple(int(word) for word in philox4x32(counter, key)) == philox4x32_10(counter, key)


def test_philox_broadcasts_tensor_keys_and_counters() -> None:
    counters = torch.tensor([[5], [2**32 - 1], [77]])
    keys = torch.tensor([1, 2**32 - 1])
    words = philox4x32((counters, 3, 0, 1), (keys, 9))
    for row in range(3):
        for column in range(2):
            expected = philox4x32_10((int(counters[row]), 3, 0, 1), (int(keys[column]), 9))
            assert tuple(int(word[row, column]) for word in words) == expected


def test_philox_bits_are_equal_when_counters_span_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = torch.arange(1000).reshape(10, 100)
    keys = torch.arange(100)
    whole = philox4x32((counter, 1, 2, 3), (keys, 5))
    monkeypatch.setattr(philox_module, "_CHUNK_OF_CPU", 7)
    for expected, word in zip(whole, philox4x32((counter, 1, 2, 3), (keys, 5)), strict=True):
        assert torch.equal(expected, word)


def test_philox_words_are_in_range_and_inputs_stay_untouched() -> None:
    counter = torch.arange(4096)
    before = counter.clone()
    for word in philox4x32((counter, counter, counter, counter), (counter, counter)):
        assert word.dtype == torch.int64
        assert 0 <= int(word.min()) <= int(word.max()) < 2**32
    assert torch.equal(counter, before)


def test_philox_ignores_bits_above_the_32nd() -> None:
    wide = philox4x32((torch.tensor([5 + 2**40]), 2**32 + 1, 0, 0), (2**33 + 7, 0))
    for word, expected in zip(wide, philox4x32_10((5, 1, 0, 0), (7, 0)), strict=True):
        assert int(word) == expected


def test_philox_takes_no_counters_at_all() -> None:
    assert [word.shape for word in philox4x32((torch.arange(0), 0, 0, 0), (0, 0))] == [torch.Size([0])] * 4


def test_philox_refuses_words_that_are_not_integers() -> None:
    with pytest.raises(TypeError, match="float32"):
        philox4x32((torch.zeros(2), 0, 0, 0), (0, 0))
    with pytest.raises(TypeError, match="float"):
        philox4x32((0.5, 0, 0, 0), (0, 0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="4 counter words"):
        philox4x32((0, 0, 0), (0, 0))


@pytest.mark.promise("noise purposes keep their numbers")
def test_purposes_keep_their_numbers() -> None:
    assert {purpose.name: purpose.value for purpose in Purpose} == GOLDEN["purposes"]


def test_run_key_splits_a_64_bit_seed_and_refuses_others() -> None:
    assert run_key(2**64 - 2) == (2**32 - 2, 2**32 - 1)
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match="seed"):
            run_key(seed)


@pytest.mark.promise("the random bits of a slice equal the same slice of the full tensor")
@given(
    index=st.lists(INDEX, min_size=1, max_size=4),
    first=st.integers(0, 40),
    length=st.integers(0, 40),
    seed=st.integers(0, 2**64 - 1),
    draw=st.integers(0, 2**24 - 1),
)
def test_uniform_words_of_a_slice_equal_the_slice_of_the_whole(
    index: list[int], first: int, length: int, seed: int, draw: int
) -> None:
    key = run_key(seed)
    rows = torch.tensor(index)
    whole = uniform_words(rows, 81, purpose=Purpose.MASK, key=key, draw=draw)
    part = uniform_words(rows[-1:], length, purpose=Purpose.MASK, key=key, draw=draw, first_position=first)
    assert torch.equal(part, whole[-1:, first : first + length])


@given(index=INDEX, position=st.integers(0, 10_000), seed=st.integers(0, 2**64 - 1), draw=st.integers(0, 2**24 - 1))
def test_uniform_words_follow_the_noise_law(index: int, position: int, seed: int, draw: int) -> None:
    made = uniform_words(
        torch.tensor([index]), 1, purpose=Purpose.VALIDATION_MASK, key=run_key(seed), draw=draw, first_position=position
    )
    counter = (index % 2**32, index // 2**32, position // 4, 9 + 256 * draw)
    assert int(made) == philox4x32_10(counter, (seed % 2**32, seed // 2**32))[position % 4]


@pytest.mark.parametrize("draw", [-1, 2**24])
def test_uniform_words_refuse_a_draw_that_would_reach_another_purpose(draw: int) -> None:
    with pytest.raises(ValueError, match="draw"):
        uniform_words(torch.tensor([0]), 4, purpose=Purpose.MASK, key=(0, 0), draw=draw)


def test_uniform_words_refuse_negative_positions() -> None:
    with pytest.raises(ValueError, match="positions"):
        uniform_words(torch.tensor([0]), 4, purpose=Purpose.MASK, key=(0, 0), first_position=-1)
